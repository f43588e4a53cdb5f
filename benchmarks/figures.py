"""Figures of a run: each provider's time in each case, and time and memory against tokens."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import CANDIDATES, KEY, Row

COLORS = {"ours": "#41618f", "baseline": "#8c8c8c", "peer": "#b8c4d6", "floor": "#dda15e"}
LABEL_WIDTH = 90  # characters of a title's line
WIDEST = 4  # bars longer than this many times the fastest are cut and labelled with their time


def plot(output: Path, rows: Sequence[Row]) -> None:
    """cases.png, time.png and memory.png of the cases that were timed."""
    try:
        import matplotlib
    except ImportError:
        print("figures not made: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "time_ms" in row and not row["case"].startswith(CANDIDATES)]
    if not timed:
        return
    _save(pyplot, _cases(pyplot, timed), output / "cases.png")
    growing = _growing_family(timed)
    for name, column, unit in (("time", "time_ms", "ms"), ("memory", "peak_mb", "extra MB")):
        _save(pyplot, _against_tokens(pyplot, growing, column, unit), output / f"{name}.png")


def _cases(pyplot: Any, rows: Sequence[Row]) -> Any:
    """One bar chart per case: ours, all others and the lower bound, fastest first."""
    labels = list(dict.fromkeys(row["case"] for row in rows))
    charts = [
        sorted((row for row in rows if row["case"] == label), key=lambda row: row["time_ms"])
        for label in labels
    ]
    heights = [0.6 + 0.22 * len(chart) for chart in charts]
    figure, axes = pyplot.subplots(
        len(charts),
        squeeze=False,
        figsize=(8, sum(heights)),
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for place, label, chart in zip(axes[:, 0], labels, charts, strict=True):
        longest = WIDEST * min(row["time_ms"] for row in chart if row["kind"] != "floor")
        for number, row in enumerate(chart):
            width = min(row["time_ms"], longest)
            place.barh(number, width, color=COLORS.get(row["kind"], "black"))
            cut = " →" if width < row["time_ms"] else ""
            place.text(width, number, f" {row['time_ms']:.3g}{cut}", va="center", fontsize=7)
        names = [row["provider"] for row in chart]
        place.set_yticks(range(len(chart)), names, fontsize=7)
        place.invert_yaxis()
        place.set_title(textwrap.fill(label, LABEL_WIDTH), fontsize=8, loc="left")
        place.set_xlim(0, 1.12 * min(longest, chart[-1]["time_ms"]))
        place.tick_params(axis="x", labelsize=7)
        place.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms")
    return figure


def _growing_family(rows: Sequence[Row]) -> list[Row]:
    """The largest set of rows that differ only in their number of tokens."""
    alike = [name for name in KEY if name not in ("case", "tokens", "provider")]
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        families.setdefault(tuple(row.get(name) for name in alike), []).append(row)
    return max(families.values(), key=lambda family: len({row["tokens"] for row in family}))


def _against_tokens(pyplot: Any, rows: Sequence[Row], column: str, unit: str) -> Any:
    """One line per provider on log axes; cases.png has providers that were measured only once."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    tokens = sorted({row["tokens"] for row in rows})
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted(
            (row["tokens"], row[column])
            for row in rows
            if row["provider"] == provider and row[column] > 0
        )
        if len(points) > 1 or len(tokens) == 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=provider)
    title = rows[0]["case"].replace(f"{rows[0]['tokens']} tokens, ", "")
    axes.set(xlabel="tokens", ylabel=unit, xscale="log", yscale="log")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(tokens, map(str, tokens))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
