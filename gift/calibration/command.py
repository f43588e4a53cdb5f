"""`gift calibration`: how well the guide of a confidence store is calibrated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gift import figures
from gift.calibration.kinds import token_kinds
from gift.calibration.measures import auroc, by_kind, calibration_error, reliability
from gift.confidence_store import (
    ConfidenceStore,
    GuideStatistics,
    load_statistics,
    load_store,
    require_same_rows,
)
from gift.config import CalibrationConfig, DataOptions
from gift.console import console, print_table
from gift.data.encoding import EncodedData, Example, encode_file
from gift.data.rows import json_lines
from gift.errors import InputError
from gift.storage.files import write_json
from gift.storage.publish import output_folder
from gift.training.micro_batches import BAND_NAMES

REPORT_FILE = "calibration.json"
FIGURE_FILE = "calibration.png"
CONTEXT_TOKENS = 24  # shown before an example


def calibration(config: CalibrationConfig, key: str = "") -> dict[str, Any]:
    """Measures a store's guide; returns the report of `measure`, which it prints and writes.

    `key` is stored in the folder's `gift_files.json`, see `publish.output_folder`.
    """
    if config.output is None:
        report = measure(config)
        _print(report)
        return report
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        report = measure(config)
        partial = output.begin()
        write_json(partial / REPORT_FILE, report)
        plot(report, partial / FIGURE_FILE)
    _print(report)
    return report


def measure(config: CalibrationConfig) -> dict[str, Any]:
    """The results of `measures`, examples of tokens and, with `correct_field`, AUROCs of rows.

    InputError: the store has no statistics or belongs to other data; `correct_field` is in no row,
    or neither true nor false.
    """
    store = load_store(config.store, "STORE")
    statistics = load_statistics(store, "STORE")
    data = _encode(config, store)
    bands = reliability(statistics.largest, statistics.top1, config.bands)
    kinds = token_kinds(data.kept, store.tokenizer())
    report = {
        "store": str(config.store),
        "guide": store.manifest["model"],
        "tokens": len(store.confidence),
        "mean_largest": float(statistics.largest.mean(dtype=np.float64)),
        "mean_entropy": float(statistics.entropy.mean(dtype=np.float64)),
        "expected_calibration_error": calibration_error(bands),
        "reliability": bands,
        "kinds": by_kind(kinds, store.confidence, statistics.top1),
        "examples": _examples(config.examples, store, statistics, data.kept),
    }
    if config.correct_field is not None:
        report["correctness"] = _correctness(config, config.correct_field, store, data)
    return report


def _encode(config: CalibrationConfig, store: ConfidenceStore) -> EncodedData:
    """The store's rows as tokens, with the options of their annotation."""
    settings = store.manifest["settings"]
    options = DataOptions(**{name: settings[name] for name in DataOptions.model_fields})
    also_read = () if config.correct_field is None else (config.correct_field,)
    tokenizer = store.tokenizer()
    context = store.shorter_context(None)
    data = encode_file(config.data, tokenizer, options, context, also_read)
    require_same_rows(store, data, tokenizer, "STORE")
    return data


def read_correct(data: Path, field: str) -> dict[int, bool]:
    """The field's values by row number from 0, for the rows that have it.

    InputError: no row has it, or a value is neither true nor false.
    """
    said: dict[int, bool] = {}
    for row, (place, _, content) in enumerate(json_lines(data)):
        value = content.get(field)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"--correct-field: {place}: {field} is {value!r}, not true or false")
        if value is not None:
            said[row] = value
    if not said:
        raise InputError(f"--correct-field: no row of {data} has {field}")
    return said


def _correctness(
    config: CalibrationConfig, field: str, store: ConfidenceStore, data: EncodedData
) -> dict[str, Any]:
    """How well a row's mean and lowest confidence separate correct from wrong responses."""
    said = read_correct(config.data, field)
    rows = [example.row for example in data.kept if example.row in said]
    if not rows:
        raise InputError(f"--correct-field: no row of {config.data} that is used has {field}")
    correct = np.array([said[row] for row in rows])
    scores = {
        "mean_confidence": np.array([store.row(row).mean(dtype=np.float64) for row in rows]),
        "lowest_confidence": np.array([store.row(row).min() for row in rows]),
    }
    return {
        "field": field,
        "rows": len(rows),
        "correct": int(correct.sum()),
        **{
            name: auroc(score, correct, config.resamples, config.seed)
            for name, score in scores.items()
        },
    }


def _examples(
    count: int, store: ConfidenceStore, statistics: GuideStatistics, examples: Sequence[Example]
) -> dict[str, list[dict[str, Any]]]:
    """Where the guide is surest of another token, and least sure of a target it finds likeliest."""
    largest, top1 = statistics.largest, statistics.top1
    others, own = np.flatnonzero(~top1), np.flatnonzero(top1)
    chosen = {
        "sure_of_another": others[np.argsort(-largest[others], kind="stable")][:count],
        "unsure_and_right": own[np.argsort(largest[own], kind="stable")][:count],
    }
    by_row = {example.row: example for example in examples}
    tokenizer = store.tokenizer()

    def shown(place: int) -> dict[str, Any]:
        row = int(np.searchsorted(store.offsets, place, side="right")) - 1
        example = by_row[row]
        position = int(np.flatnonzero(example.is_target)[place - store.offsets[row]])
        ids = example.input_ids.tolist()
        return {
            "row": row,
            "before": tokenizer.decode(ids[max(0, position - CONTEXT_TOKENS) : position]),
            "target": tokenizer.decode([ids[position]]),
            "confidence": float(store.confidence[place]),
            "largest": float(largest[place]),
            "entropy": float(statistics.entropy[place]),
        }

    return {name: [shown(int(place)) for place in places] for name, places in chosen.items()}


def _print(report: dict[str, Any]) -> None:
    error = 100 * report["expected_calibration_error"]
    print_table(
        f"{report['store']}: reliability over {report['tokens']} tokens, expected calibration "
        f"error {error:.1f} %",
        ("largest probability", "tokens", "its mean %", "first choice is the target %"),
        [
            (
                f"{band['from']:.3g} to {band['to']:.3g}",
                str(band["tokens"]),
                f"{100 * band['mean_largest']:.1f}",
                f"{100 * band['first_choice_is_target']:.1f}",
            )
            for band in report["reliability"]
        ],
    )
    print_table(
        "Confidence q in the target, by kind of token",
        (
            "kind",
            "tokens",
            "share %",
            "mean q",
            *(f"{name.replace(' ', '')} %" for name in BAND_NAMES),
        ),
        [
            (
                kind["kind"],
                str(kind["tokens"]),
                f"{100 * kind['share']:.1f}",
                f"{kind['mean_confidence']:.3f}",
                *(f"{100 * share:.1f}" for share in kind["by_confidence"].values()),
            )
            for kind in report["kinds"]
        ],
    )
    for name, title in (
        ("sure_of_another", "Sure of another token than the target"),
        ("unsure_and_right", "Unsure, and the target is its first choice"),
    ):
        for number, example in enumerate(report["examples"][name]):
            if number == 0:
                console.print(title, style="bold", highlight=False)
            text = f"{example['before']}[[{example['target']}]]".replace("\n", "\\n")
            console.print(
                f"row {example['row']}: q {example['confidence']:.3g}, largest "
                f"{example['largest']:.3g}: {text}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    if "correctness" in report:
        _print_correctness(report["correctness"])


def _print_correctness(found: dict[str, Any]) -> None:
    rows = []
    for name in ("mean_confidence", "lowest_confidence"):
        area = found[name]
        rows.append(
            (
                f"a row's {name.replace('_', ' ')}",
                "undefined" if area is None else f"{area['auroc']:.3f}",
                "" if area is None else f"{area['low']:.3f} to {area['high']:.3f}",
            )
        )
    print_table(
        f"Does confidence tell which of {found['rows']} responses are correct "
        f"({found['correct']} are)? 0.5 is no information",
        ("score", "AUROC", "95 % interval"),
        rows,
    )


def plot(report: dict[str, Any], output: Path) -> None:
    """Reliability and the confidence of each kind of token; nothing without matplotlib."""
    if not figures.can_draw():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    bands, tokens = report["reliability"], report["tokens"]
    figures.draw_reliability(left, [("first choice is the target", bands)], ["C0"])
    left.bar(
        [50 * (band["from"] + band["to"]) for band in bands],
        [100 * band["tokens"] / tokens for band in bands],
        width=[100 * (band["to"] - band["from"]) for band in bands],
        alpha=0.2,
        label="share of tokens",
    )
    error = 100 * report["expected_calibration_error"]
    left.set_title(f"expected calibration error {error:.1f} %", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    kinds, start = report["kinds"], np.zeros(len(report["kinds"]))
    for name in BAND_NAMES:
        shares = np.array([kind["by_confidence"][name] for kind in kinds])
        right.barh([kind["kind"] for kind in kinds], shares, left=start, label=name)
        start += shares
    right.invert_yaxis()
    right.set_xlabel("share of the kind's tokens")
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
