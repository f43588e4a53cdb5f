"""Figures, drawn where matplotlib (the extra `report`) is installed."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INSTALL = "pip install matplotlib"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_training(metrics: Path, output: Path) -> None:
    """Loss, plain nll and mean weight against steps, from a metrics file; nothing without steps."""
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not can_draw() or not entries:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry["step"] for entry in entries]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    left.plot(steps, [entry["loss"] for entry in entries], label="weighted loss")
    left.plot(steps, [entry["nll"] for entry in entries], label="plain nll", alpha=0.6)
    left.set_ylabel("nats per token")
    right.plot(steps, [entry["token_accuracy"] for entry in entries], label="token accuracy")
    right.plot(steps, [entry["mean_weight"] for entry in entries], label="mean weight")
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def draw_reliability(
    panel: Any, guides: Sequence[tuple[str, Sequence[Mapping[str, float]]]], colors: Sequence[str]
) -> None:
    """One line per guide: how often its likeliest token is the target, against its probability.

    A guide is given by its label and the bands of `calibration.measures.reliability`.
    """
    panel.plot([0, 100], [0, 100], "--", color="grey", linewidth=1)
    for color, (label, bands) in zip(colors, guides, strict=True):
        sure = [100 * band["mean_largest"] for band in bands]
        right = [100 * band["first_choice_is_target"] for band in bands]
        panel.plot(sure, right, marker=".", color=color, label=label)
    panel.set_xlabel("the guide's largest probability, %", fontsize=8)
    panel.set_ylabel("its likeliest token is the data's, %", fontsize=8)
