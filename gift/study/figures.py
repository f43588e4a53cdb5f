"""The report's figures, as SVG in data URIs; empty where matplotlib is not installed."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gift.figures import can_draw, draw_reliability

COLORS = ("#777777", "#1f6f8b", "#d1603d", "#5b8c5a", "#8a5a9e", "#c49a2c", "#3d405b", "#b56576")
COLUMNS = 3  # of panels
LEGEND_LINE = 0.17  # inches
FEW = 8  # methods: more are drawn closer together, with a legend
Box = tuple[float, float, float, float]  # left, low, right, high, in points
Palette = Mapping[str, str]
# Panels by title; in each, points of a line by the line's name.
Lines = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
BANDS = ("#b5493c", "#dda15e", "#8fb3a5", "#2f6b5b")


def draw_accuracies(accuracy: Mapping[str, Mapping[str, Any]], palette: Palette) -> str:
    """One panel per evaluation: every method's accuracy with its interval; dots are runs."""
    methods = list(next(iter(accuracy.values())))
    figure, panels = _panels(len(accuracy), 3.4, _row_height(len(methods)) * len(methods) + 1.1)
    for number, (panel, (name, values)) in enumerate(zip(panels, accuracy.items(), strict=True)):
        for place, (method, value) in enumerate(values.items()):
            color = palette[method]
            panel.barh(place, 100 * value["mean"], height=0.6, color=color, alpha=0.55)
            if value["low"] is not None:
                low, high = 100 * value["low"], 100 * value["high"]
                panel.plot([low, high], [place, place], color="black", linewidth=1.6)
            runs = [100 * run for run in value["runs"]]
            panel.plot(runs, [place] * len(runs), "o", color=color, markersize=3)
        panel.set_title(name, fontsize=10)
        panel.set_xlim(0, 100)
        # One set of names per row of panels.
        panel.set_yticks(range(len(methods)), [] if number % COLUMNS else methods, fontsize=8)
        panel.set_ylim(len(methods) - 0.4, -0.6)
        panel.set_xlabel("right answers, %", fontsize=8)
    return _embedded(figure)


def draw_retention(
    task: str, points: Mapping[str, Mapping[str, tuple[float, float]]], palette: Palette
) -> str:
    """One panel per retention evaluation: retention against task accuracy, a point per method."""
    most = max(map(len, points.values()))
    figure, panels = _panels(len(points), 4.6, max(3.4, LEGEND_LINE * most))
    for panel, (retention, by_method) in zip(panels, points.items(), strict=True):
        for number, (method, (x, y)) in enumerate(by_method.items(), 1):
            name = f"{number} {method}"
            panel.plot(100 * x, 100 * y, "o", color=palette[method], markersize=6, label=name)
        panel.set_xlabel(f"{task}: right answers, %", fontsize=8)
        panel.set_ylabel(f"{retention}: right answers, %", fontsize=8)
        panel.margins(0.2)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    for panel, by_method in zip(panels, points.values(), strict=True):
        few = len(by_method) <= FEW
        labels = [m if few else str(number) for number, m in enumerate(by_method, 1)]
        _label(panel, [(100 * x, 100 * y) for x, y in by_method.values()], labels)
    if most > FEW:
        panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _embedded(figure)


def _label(panel: Any, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Labels points (x, y): each label as near to its point as possible without overlap.

    The figure's layout is computed first, so that limits and sizes are final.
    """
    per_inch = panel.figure.dpi
    places = panel.transData.transform(points) * 72 / per_inch
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    for point, (x, y), label in zip(points, places, labels, strict=True):
        width, height = 5 * len(label) + 3, 9
        for step in range(400):
            distance, angle = 8 + step // 16 * 3, math.tau * (step % 16 + 1) / 16
            left = x + distance * math.cos(angle) - width / 2 * (1 - math.cos(angle))
            low = y + distance * math.sin(angle) - height / 2
            box = left, low, left + width, low + height
            if not any(_cross(box, other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.4, "shrinkB": 2} if distance > 8 else None
        panel.annotate(
            label,
            point,
            (left - x, low - y),
            textcoords="offset points",
            fontsize=8,
            va="bottom",
            arrowprops=line,
        )


def _cross(one: Box, other: Box) -> bool:
    """Whether two boxes overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def draw_lines(panels: Lines, x_label: str, y_label: str, palette: Palette) -> str:
    """One panel per name, with a line per method through its points (x, y)."""
    most = max(map(len, panels.values()))
    figure, axes = _panels(len(panels), 3.6, max(2.9, LEGEND_LINE * most))
    for panel, (name, lines) in zip(axes, panels.items(), strict=True):
        for method, points in lines.items():
            color, label = palette[method], _in_legend(method)
            panel.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel(x_label, fontsize=8)
        panel.set_ylabel(y_label, fontsize=8)
        panel.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _embedded(figure)


def draw_bands(shares: Mapping[str, Mapping[str, float]]) -> str:
    """One bar per method: the share of the loss of each confidence band."""
    figure, (panel,) = _panels(1, 7.0, _row_height(len(shares)) * len(shares) + 1.2)
    left = [0.0] * len(shares)
    for color, band in zip(BANDS, next(iter(shares.values())), strict=True):
        widths = [100 * values[band] for values in shares.values()]
        panel.barh(list(shares), widths, left=left, color=color, label=band)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    panel.set_xlim(0, 100)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_ylim(len(shares) - 0.4, -0.6)
    panel.set_xlabel("share of the weighted loss, %", fontsize=8)
    panel.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _embedded(figure)


def draw_calibration(calibrations: Sequence[Mapping[str, Any]]) -> str:
    """One panel per guide: its reliability with every pair."""
    guides: dict[str, list[tuple[str, Any]]] = {}
    for one in calibrations:
        line = _in_legend(one["pair"]), one["reliability"]
        guides.setdefault(one["guide"], []).append(line)
    figure, panels = _panels(len(guides), 3.6, 3.2)
    for panel, (guide, lines) in zip(panels, guides.items(), strict=True):
        # Without the instruct model's color.
        draw_reliability(panel, lines, _colors(len(lines) + 1)[1:])
        panel.set_title(guide, fontsize=9)
        panel.grid(alpha=0.3)
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _embedded(figure)


def _row_height(rows: int) -> float:
    """Of bars, in inches."""
    return 0.42 if rows <= FEW else 0.25


def _in_legend(name: str) -> str:
    """A label that matplotlib shows even if the name begins with _."""
    return f" {name}"


def _colors(count: int) -> list[str]:
    """Distinct colors."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps, colors

    spread = colormaps["turbo"]
    return [colors.to_hex(spread(number / (count - 1))) for number in range(count)]


def _panels(count: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False
    )
    panels = axes.flatten()
    for unused in panels[count:]:
        unused.axis("off")
    return figure, panels[:count]


def _embedded(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    legends = [legend for panel in figure.axes if (legend := panel.get_legend())]
    # Legends are outside the panels and take no room from them.
    for legend in legends:
        legend.set_in_layout(False)
    figure.tight_layout()
    for legend in legends:
        legend.set_in_layout(True)
    with pyplot.rc_context({"svg.hashsalt": "gift"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def figures_of(
    results: Mapping[str, Any],
    layers: Mapping[str, Any],
    calibrations: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Every figure by name; none where matplotlib is not installed."""
    if not can_draw():
        return {}
    from matplotlib import rc_context

    # A $ in a name does not begin a formula.
    with rc_context({"text.parse_math": False}):
        return _draw_all(results, layers, calibrations)


def _draw_all(
    results: Mapping[str, Any],
    layers: Mapping[str, Any],
    calibrations: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    accuracy, bands = results["accuracy"], {k: v for k, v in results["loss_by_band"].items() if v}
    curves = {
        name: {
            method: [(n, 100 * value) for n, value in enumerate(curve, 1)]
            for method, curve in by_method.items()
        }
        for name, by_method in results["pass"].items()
        if len(next(iter(by_method.values()))) > 1
    }
    methods = list(next(iter(accuracy.values())))
    palette = dict(zip(methods, _colors(len(methods)), strict=True))
    tasks, retained = results["task_evaluations"], results["retention_evaluations"]
    figures = {"accuracy": draw_accuracies(accuracy, palette)}
    if tasks and retained:
        points = {
            name: {m: (accuracy[tasks[0]][m]["mean"], accuracy[name][m]["mean"]) for m in methods}
            for name in retained
        }
        figures["retention"] = draw_retention(tasks[0], points, palette)
    if curves:
        figures["pass"] = draw_lines(curves, "N", "right in at least one of N, %", palette)
    if bands:
        figures["bands"] = draw_bands(bands)
    if calibrations:
        figures["calibration"] = draw_calibration(calibrations)
    if layers:
        figures["layers"] = draw_lines(layers, "layer", "mean ‖Δ‖ / ‖A‖", palette)
    return figures
