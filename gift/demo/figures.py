"""The demo's figures, drawn where matplotlib is installed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gift.figures import can_draw


def plot_accuracy(results: Sequence[dict[str, Any]], output: Path) -> None:
    """Task accuracy, greedy and sampled, by method: bars are means, dots single runs."""
    if not can_draw():
        return
    pyplot = _pyplot()
    methods = list(dict.fromkeys(entry["method"] for entry in results))
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for offset, (measure, label) in enumerate(
        (("task_greedy", "greedy"), ("task_sampled", "sampled"))
    ):
        for number, method in enumerate(methods):
            values = [entry[measure] for entry in results if entry["method"] == method]
            x = number + 0.38 * offset - 0.19
            axes.bar(
                x,
                fmean(values),
                width=0.36,
                color=("#b8c4d6", "#41618f")[offset],
                label=label if number == 0 else None,
            )
            axes.plot([x] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_ylabel("task accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="upper left")
    _save(pyplot, figure, output)


def plot_loss_by_band(results: Sequence[dict[str, Any]], output: Path) -> None:
    """Share of the weighted loss by the instruct model's confidence, per method."""
    if not can_draw():
        return
    pyplot = _pyplot()
    methods = [
        method
        for method in dict.fromkeys(entry["method"] for entry in results)
        if any(entry["method"] == method and entry["loss_by_band"] for entry in results)
    ]
    figure, axes = pyplot.subplots(figsize=(8, 2.6))
    left = [0.0] * len(methods)
    shares = {
        method: [entry["loss_by_band"] for entry in results if entry["method"] == method]
        for method in methods
    }
    bands = list(shares[methods[0]][0])
    for band, color in zip(bands, ("#b5493c", "#dda15e", "#8fb3a5", "#2f6b5b"), strict=True):
        widths = [100 * fmean(entry[band] for entry in shares[method]) for method in methods]
        axes.barh(methods, widths, left=left, color=color, label=band)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("share of the weighted loss, %")
    axes.set_xlim(0, 100)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(pyplot, figure, output)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, output: Path) -> None:
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
