"""`gift demo`: makes tiny base/instruct pairs and shows what each way of adapting does to them."""

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gift.config import DemoConfig
from gift.console import console, error_console, print_table, progress
from gift.demo.figures import plot_accuracy, plot_loss_by_band
from gift.demo.study import METHODS, Sizes, study_pair
from gift.figures import INSTALL, can_draw
from gift.files import write_json
from gift.publish import output_folder

FIRST_PAIR_SEED = 10
MEASURES = {
    "task_sampled": "task, sampled",
    "task_greedy": "task, greedy",
    "worked_style": "own worked style",
    "task_constraint_kept": "constraint kept on task",
    "other_exact": "other tasks, exact",
    "other_format": "other tasks, format",
}
FIGURES = {"accuracy.png": plot_accuracy, "loss_by_band.png": plot_loss_by_band}
COMPARED = ("Instruct", "Instruct-SFT", "Shadow-FT", "GIFT-BaseT")


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the study, prints its tables and writes models, replies, results and figures."""
    started = time.perf_counter()
    with output_folder(config.output, overwrite=config.overwrite) as output:
        partial = output.begin()
        results = _study(config, partial)
        results.sort(key=lambda entry: (entry["pair"], entry["seed"]))
        summary = {
            "settings": config.model_dump(mode="json", exclude={"output", "overwrite"}),
            "results": results,
            "means": _means(results),
            "advantage_of_gift": _advantages(results),
            "seconds": time.perf_counter() - started,
        }
        write_json(partial / "results.json", summary)
        for name, plot in FIGURES.items():
            plot(results, partial / name)
    _print(config, summary)
    return summary


def _study(config: DemoConfig, partial: Path) -> list[dict[str, Any]]:
    sizes = Sizes(questions=config.questions, steps=config.scale)
    pair_seeds = [FIRST_PAIR_SEED + number for number in range(config.pairs)]
    results = []
    error_console.print(
        f"Making {config.pairs} pairs of tiny models and adapting each {config.seeds} times in "
        f"{len(METHODS) - 1} ways: one to two minutes on two cores.",
        highlight=False,
    )
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    pool = ProcessPoolExecutor(
        max_workers=min(config.workers, config.pairs),
        mp_context=get_context("spawn"),
        initializer=_begin_worker,
    )
    with pool, progress("demo", config.pairs) as bar:
        jobs = [
            pool.submit(
                study_pair,
                partial / f"pair-{pair_seed}",
                pair_seed,
                range(config.seeds),
                sizes,
                config.clean,
            )
            for pair_seed in pair_seeds
        ]
        for job in as_completed(jobs):
            results += job.result()
            bar.advance()
    return results


def _begin_worker() -> None:
    """One core a worker: two threads would be no faster on models of this size."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")


def _means(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and standard deviation over pairs and seeds, by method and measure, in percent."""
    means = {}
    for method in METHODS:
        entries = [entry for entry in results if entry["method"] == method.name]
        means[method.name] = {
            measure: _mean_and_deviation([entry[measure] for entry in entries])
            for measure in MEASURES
        }
    return means


def _advantages(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """GIFT's sampled task accuracy minus each other method's, run by run, in points."""

    def scores(method: str) -> list[float]:
        return [entry["task_sampled"] for entry in results if entry["method"] == method]

    advantages = {}
    for other in COMPARED:
        differences = [
            gift - theirs for gift, theirs in zip(scores("GIFT"), scores(other), strict=True)
        ]
        advantages[other] = {
            **_mean_and_deviation(differences),
            "ahead": sum(difference > 0 for difference in differences),
            "runs": len(differences),
        }
    return advantages


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def _shown(value: dict[str, Any], mean_format: str = ".1f") -> str:
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.1f}"
    return f"{value['mean']:{mean_format}}{deviation}"


def _print(config: DemoConfig, summary: dict[str, Any]) -> None:
    runs = config.pairs * config.seeds
    print_table(
        f"Accuracy in %, mean ± standard deviation of {runs} runs "
        f"({config.pairs} pairs × {config.seeds} seeds)",
        ("", *MEASURES.values()),
        [
            (method, *(_shown(v) for v in measures.values()))
            for method, measures in summary["means"].items()
        ],
    )
    print_table(
        "GIFT's sampled task accuracy minus that of the other, same pair and seed, in points",
        ("", "mean ± sd", "ahead in"),
        [
            (other, _shown(v, "+.1f"), f"{v['ahead']} of {v['runs']}")
            for other, v in summary["advantage_of_gift"].items()
        ],
    )
    loss_by_band = _loss_by_band(summary["results"])
    bands = list(next(iter(loss_by_band.values())))
    print_table(
        "Weighted loss by the instruct model's confidence q, share of Σ w·nll in %",
        ("", *bands),
        [
            (method, *(f"{100 * share:.1f}" for share in shares.values()))
            for method, shares in loss_by_band.items()
        ],
    )
    references = "clean" if config.clean else "noisy"
    console.print(
        f"References were {references}. In {config.output} are results.json, every reply, the "
        f"adapters and models, {', '.join(FIGURES) if can_draw() else 'but no figures'} "
        f"({summary['seconds']:.0f} s).",
        highlight=False,
        soft_wrap=True,
    )
    if not can_draw():
        console.print(f"{' and '.join(FIGURES)} need matplotlib: {INSTALL}", highlight=False)


def _loss_by_band(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean share of the weighted loss per confidence band, for Shadow-FT and GIFT."""
    loss_by_band = {}
    for method in ("Shadow-FT", "GIFT"):
        entries = [entry["loss_by_band"] for entry in results if entry["method"] == method]
        loss_by_band[method] = {
            band: fmean(entry[band] for entry in entries) for band in entries[0]
        }
    return loss_by_band
