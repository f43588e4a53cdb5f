"""Results on disk: rows as CSV and JSON, a Markdown table, figures; and what moved between two."""

import csv
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS_FILE = "results.json"
CANDIDATES = "candidates: "  # begins the labels of cases that compare our own settings
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)
KEY = (
    "case", "op", "head", "tokens", "dtype", "data", "weighting", "trainable", "direction", "rank",
    "factor_dtype", "provider",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date of a run."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class Results:
    """All that one run found. `rows` are measured cases, `tables` anything else, by its title.

    `data` is what the inputs of each case look like, by the case's label.
    """

    output: Path
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def save(self) -> None:
        """Writes results.json, results.csv and results.md; call it often, so nothing is lost."""
        self.output.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in vars(self).items() if name != "output"}
        temporary = self.output / f".{RESULTS_FILE}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.output / RESULTS_FILE)
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.output / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        (self.output / "results.md").write_text(markdown(self), encoding="utf-8")


def read_results(folder: Path) -> Results:
    """What `Results.save` wrote."""
    try:
        content = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{folder}: has no {RESULTS_FILE}; give folders of results") from None
    return Results(folder, **content)


def markdown(results: Results) -> str:
    """One table a case, fastest first; who was not run, or was wrong, is listed with the reason."""
    settings, data, rows = results.environment, results.data, results.rows
    lines = [f"# {settings['device']}, {settings['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    for title, table in results.tables.items():
        lines += ["", f"## {title}", "", *plain_table(table)]
    for label in dict.fromkeys(row["case"] for row in rows):
        lines += ["", f"## {label}", ""]
        if data.get(label):
            lines += [", ".join(f"{k} {v:.3g}" for k, v in data[label].items()), ""]
        lines += [
            "| provider | ms (p20 to p80) | × floor | × best peer | peak extra MB | TFLOP/s | GB/s "
            "| error | note |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        mine = [row for row in rows if row["case"] == label]
        for row in sorted(mine, key=lambda row: row.get("time_ms", float("inf"))):
            lines.append(_markdown_row(row))
    return "\n".join(lines) + "\n"


def plain_table(rows: Sequence[Row]) -> list[str]:
    """Markdown of rows that share their columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = ["" if row.get(name) is None else row[name] for name in columns]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _markdown_row(row: Row) -> str:
    errors = [row[name] for name in row if name.startswith("error_")]
    error = f"{max(errors):.1e}" if errors else ""
    if "time_ms" not in row:
        return f"| {row['provider']} | {row['status']} | | | | | | {error} | {row['note']} |"
    ratios = " | ".join(
        "" if row.get(name) is None else f"{row[name]:.2f}"
        for name in ("ratio_floor", "ratio_best_peer")
    )
    return (
        f"| {row['provider']} | {row['time_ms']:.3g} ({row['p20_ms']:.3g} to {row['p80_ms']:.3g}) "
        f"| {ratios} | {row['peak_mb']:.3g} | {row['tflops']:.3g} | {row['gb_per_s']:.3g} "
        f"| {error} | {row['note']} |"
    )


def plot(output: Path, rows: Sequence[Row]) -> None:
    """time.png and memory.png against tokens, and ratios.png, of every case that was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "time_ms" in row and not row["case"].startswith(CANDIDATES)]
    if not timed:
        return
    alike = [name for name in KEY if name not in ("case", "tokens", "provider")]
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in timed:
        families.setdefault(tuple(row.get(name) for name in alike), []).append(row)
    growing = max(families.values(), key=lambda family: len({row["tokens"] for row in family}))
    for name, column, unit in (("time", "time_ms", "ms"), ("memory", "peak_mb", "extra MB")):
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for provider in dict.fromkeys(row["provider"] for row in growing):
            points = sorted(
                (row["tokens"], row[column]) for row in growing if row["provider"] == provider
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=provider)
        axes.set(xlabel="tokens", ylabel=unit, xscale="log", title=growing[0]["case"])
        if all(row[column] > 0 for row in growing):
            axes.set_yscale("log")
        axes.legend(fontsize=7)
        figure.savefig(output / f"{name}.png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
    ours = [row for row in timed if row["kind"] == "ours" and row.get("ratio_best_peer")]
    if ours:
        figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(ours) + 1))
        labels = [f"{row['case']}: {row['provider']}" for row in ours]
        axes.barh(labels, [row["ratio_best_peer"] for row in ours])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("time / time of the fastest other provider")
        axes.tick_params(axis="y", labelsize=6)
        figure.savefig(output / "ratios.png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)


def compare(before: Path, after: Path) -> str:
    """Markdown table of times that both results have; a warning where the devices differ."""
    old, new = (read_results(path) for path in (before, after))
    devices = [result.environment["device"] for result in (old, new)]
    lines = []
    if devices[0] != devices[1]:
        lines += [f"Different devices ({devices[0]}; {devices[1]}): times do not compare.", ""]
    lines += [
        "| case | provider | before, ms | after, ms | after / before |",
        "|---|---|---|---|---|",
    ]
    times = {_key(row): row for row in old.rows}
    for row in new.rows:
        other = times.get(_key(row), {})
        if "time_ms" in row and "time_ms" in other:
            lines.append(
                f"| {row['case']} | {row['provider']} | {other['time_ms']:.3g} "
                f"| {row['time_ms']:.3g} | {row['time_ms'] / other['time_ms']:.2f} |"
            )
        elif row["status"] != other.get("status"):
            was = other.get("status", "absent")
            lines.append(f"| {row['case']} | {row['provider']} | {was} | {row['status']} | |")
    return "\n".join(lines)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def _output(*command: str) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
