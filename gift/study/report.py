"""`gift report`: a study as one HTML file, which needs no network."""

import re
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined

from gift.config import ReportConfig
from gift.config.study import INSTRUCT
from gift.console import console
from gift.merge.methods import METHODS
from gift.storage.files import read_json, read_record, replacing
from gift.study.figures import figures_of
from gift.study.results import Study, in_percent, read_study, shown_p
from gift.training.micro_batches import BAND_NAMES
from gift.weighting.controls import ABOUT as CONTROLS
from gift.weighting.formulas import WEIGHTINGS

REPORT_FILE = "report.html"
SHOWN = 5  # questions won and lost; more guides than this are folded
SHOWN_RUNS = 60
MAIN_OPTIONS = ("trained", "weighting", "guide", "method")
LAYER = re.compile(r"\.(\d+)\.")
WARNING = re.compile(r"^warning: (.*)$", re.M)
HASHES = ("base_model_hash", "guide_model_hash", "tokenizer_hash", "template_hash", "data_hash")


def report(config: ReportConfig) -> Path:
    """Writes report.html into the study's folder; returns its path.

    InputError: the folder is not a finished study, or lacks a stage.
    """
    study = read_study(config.study)
    path = write_report(study, study.results())
    console.print(f"The report is {path}", highlight=False, soft_wrap=True)
    return path


def write_report(study: Study, results: dict[str, Any]) -> Path:
    """Writes report.html from a study and its results; returns its path."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": in_percent, "p": shown_p}
    template = environment.from_string(
        files("gift.study").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    layers = changes_by_layer(study)
    calibrations = study.calibrations()
    others = len(study.methods) - 1
    html = template.render(
        title=study.settings["title"] or f"{results['compared']} and {others} others, compared",
        study=study,
        results=results,
        figures=figures_of(results, layers, calibrations),
        layers=layers,
        calibrations=calibrations,
        bands=BAND_NAMES,
        questions={name: questions_decided(study, name) for name in study.evaluations},
        health=_health(study),
        warnings=_warnings(study),
        identities=_identities(study),
        settings=yaml.safe_dump(study.settings, sort_keys=False, allow_unicode=True),
        instruct=INSTRUCT,
        own_options=_own_options(study),
        choices=_choices(study),
        shown=SHOWN,
        shown_runs=SHOWN_RUNS,
    )
    path = study.folder / REPORT_FILE
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def changes_by_layer(study: Study) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Each method's mean relative change ‖Δ‖ / ‖A‖ of a layer's changed tensors, from gift diff.

    By the models' number of layers, then by method.
    """
    diffs = [
        (run["pair"], run["method"], _tensors_by_layer(study, run["stages"]["diff"]))
        for run in study.record["runs"]
        if "diff" in run["stages"]
    ]
    depths = {pair: len(layers) for pair, _, layers in diffs}
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for depth in sorted(set(depths.values())):
        pairs = [pair for pair in study.settings["pairs"] if depths.get(pair) == depth]
        by_method = found.setdefault(f"{depth} layer(s), {len(pairs)} pair(s)", {})
        for method in dict.fromkeys(method for _, method, _ in diffs):
            own = [layers for pair, name, layers in diffs if name == method and pair in pairs]
            changes = {
                layer: [change for one in own for change in one[layer] if change > 0]
                for layer in sorted(own[0] if own else ())
            }
            if points := [(layer, float(np.mean(each))) for layer, each in changes.items() if each]:
                by_method[method] = points
    return {models: by_method for models, by_method in found.items() if by_method}


def _tensors_by_layer(study: Study, stage: str) -> dict[int, list[float]]:
    """The relative changes of each layer's tensors."""
    layers: dict[int, list[float]] = defaultdict(list)
    for tensor in read_json(study.stage(stage) / "diff.json")["tensors"]:
        if layer := LAYER.search(tensor["name"]):
            layers[int(layer[1])].append(tensor["relative_change"])
    return layers


def _own_options(study: Study) -> dict[str, str]:
    """The reference method's main options; for other methods the options that differ."""
    methods, compared = study.settings["methods"], study.record["compared"]
    usual = methods[compared]
    own = {
        name: {key: value for key, value in options.items() if value != usual[key]}
        for name, options in methods.items()
    }
    own[compared] = {key: usual[key] for key in MAIN_OPTIONS}
    return {
        name: ", ".join(f"{k}: {v}" for k, v in own[name].items() if k != "about")
        for name in methods
    }


def _choices(study: Study) -> list[tuple[str, dict[str, str]]]:
    """The study's weightings, controls and merge methods, each with a sentence."""
    methods = [study.settings["methods"][name] for name in study.methods[1:]]
    parts = (
        ("weighting", "Weightings of tokens", {k: one.about for k, one in WEIGHTINGS.items()}),
        ("control", "Controls: what takes the place of the guide's confidence", CONTROLS),
        ("method", "Ways to merge", {k: one.about for k, one in METHODS.items()}),
    )
    found = []
    for option, title, sentences in parts:
        used = dict.fromkeys(one[option] for one in methods if one[option] is not None)
        if used:
            found.append((title, {name: sentences[name] for name in used}))
    return found


def questions_decided(study: Study, evaluation: str) -> dict[str, list[dict[str, Any]]]:
    """The questions that the reference method wins and loses against the instruct model.

    Each list is sorted by the difference in the share of right answers, with a reply of each model.
    """
    decided: dict[str, list[dict[str, Any]]] = {"wins": [], "losses": []}
    for pair in study.settings["pairs"]:
        ours = [
            study.answers(run, evaluation) for run in study.runs(study.record["compared"], pair)
        ]
        theirs = [study.answers(run, evaluation) for run in study.runs(INSTRUCT, pair)]
        for number in range(len(theirs[0])):
            # All seeds' replies to one question.
            one, other = (
                [sample for answers in side for sample in answers[number]]
                for side in (ours, theirs)
            )
            share, other_share = (np.mean([s["correct"] for s in side]) for side in (one, other))
            if share == other_share:
                continue
            won = bool(share > other_share)
            decided["wins" if won else "losses"].append(
                {
                    "pair": pair,
                    "prompt": one[0]["prompt"],
                    "answer": one[0]["answer"],
                    "share": float(share),
                    "other_share": float(other_share),
                    "reply": _reply(one, correct=won),
                    "other_reply": _reply(other, correct=not won),
                }
            )
    return {
        name: sorted(entries, key=lambda e: -abs(e["share"] - e["other_share"]))
        for name, entries in decided.items()
    }


def _reply(samples: list[dict[str, Any]], *, correct: bool) -> str:
    """A right, or a wrong, reply; for multiple choice the letter."""
    sample = next(one for one in samples if one["correct"] == correct)
    return sample["reply"] if "reply" in sample else sample["chosen"]


def _health(study: Study) -> list[dict[str, Any]]:
    """Shares of replies without an end or an answer, by evaluation and method."""
    rows = []
    for evaluation in study.evaluations:
        for method in study.methods:
            metrics = [study.metrics(run, evaluation) for run in study.runs(method)]
            if "unfinished" in metrics[0]:
                rows.append(
                    {
                        "evaluation": evaluation,
                        "method": method,
                        **{
                            name: float(np.mean([one[name] for one in metrics]))
                            for name in ("unfinished", "no_answer_found", "mean_reply_tokens")
                        },
                    }
                )
    return rows


def _stage_names(study: Study) -> list[str]:
    """The folders of all stages that the runs have, each once."""
    return list(
        dict.fromkeys(
            name
            for run in study.record["runs"]
            for name in (*run["stages"].values(), *run["evaluations"].values())
        )
    )


def _warnings(study: Study) -> list[tuple[str, str]]:
    """The warnings of the stages: (stage, message)."""
    logs = ((name, study.stage(name).with_suffix(".log")) for name in _stage_names(study))
    return [
        (name, message)
        for name, path in logs
        if path.exists()
        for message in dict.fromkeys(WARNING.findall(path.read_text(encoding="utf-8")))
    ]


def _identities(study: Study) -> list[tuple[str, str, str]]:
    """(pair, what, sha256) of models, tokenizers and data."""
    found: dict[tuple[str, str, str], None] = {}
    for run in study.record["runs"]:
        for evaluation in run["evaluations"]:
            metrics = study.metrics(run, evaluation)
            found[run["pair"], f"questions of {evaluation}", metrics["data_hash"]] = None
            if run["method"] == INSTRUCT:
                found[run["pair"], "instruct model", metrics["model_hash"]] = None
        if "train" in run["stages"]:
            path = study.stage(run["stages"]["train"]) / "gift_train.json"
            manifest = read_record(path, HASHES)
            for name in HASHES:
                what = "trained model" if name == "base_model_hash" else name.removesuffix("_hash")
                found[run["pair"], what.replace("_", " "), manifest[name]] = None
    return sorted(found)
