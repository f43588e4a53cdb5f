"""Results on disk: rows as CSV and JSON, a Markdown table; and what changed between two runs."""

import csv
import json
import math
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
RESULTS_FILE = "results.json"
RUN = ("device", "commit", "date")  # columns of results.csv that say where rows are from
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
        "device": ", ".join(filter(None, [f"CPU, {torch.get_num_threads()} threads", _cpu()])),
        "python": platform.python_version(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"),
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


def new_folder(output: Path | None, environment: Row, overwrite: bool = False) -> Path:
    """Where a run's results go: by default to a folder named after device and day."""
    if output is None:
        device = environment["device"]
        if of_cpu := re.match(r"CPU, \d+ threads", device):
            device = of_cpu.group()
        device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        output = ROOT / "benchmarks" / "results" / f"{device}-{environment['date'][:10]}"
    if (output / RESULTS_FILE).exists() and not overwrite:
        raise SystemExit(f"--output: {output} holds results already; choose another folder")
    return output


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
        columns = list(dict.fromkeys([*(name for row in self.rows for name in row), *RUN]))
        run = {name: self.environment.get(name) for name in RUN}
        with (self.output / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**row, **run} for row in self.rows)
        (self.output / "results.md").write_text(markdown(self), encoding="utf-8")


def read_results(folder: Path) -> Results:
    """What `Results.save` wrote."""
    try:
        content = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{folder}: has no {RESULTS_FILE}; give folders of results") from None
    return Results(folder, **content)


def markdown(results: Results) -> str:
    """One table a case, fastest first; providers not run, or wrong, are listed with the reason."""
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
            "| provider | ms (p20 to p80) | samples | × lower bound | × best peer | peak extra MB "
            "| TFLOP/s | GB/s | error | note |",
            "|---|---|---|---|---|---|---|---|---|---|",
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
        return f"| {row['provider']} | {row['status']} | | | | | | | {error} | {row['note']} |"
    ratios = " | ".join(
        "" if row.get(name) is None else f"{row[name]:.2f}"
        for name in ("ratio_floor", "ratio_best_peer")
    )
    return (
        f"| {row['provider']} | {row['time_ms']:.3g} ({row['p20_ms']:.3g} to {row['p80_ms']:.3g}) "
        f"| {row['samples']} | {ratios} | {row['peak_mb']:.3g} | {row['tflops']:.3g} "
        f"| {row['gb_per_s']:.3g} | {error} | {row['note']} |"
    )


# Columns that identify a row of any table. All others are figures, except FOLLOWING, which say how
# a case was measured or follow from another figure.
NAMES = ("case", "provider", "stage", "model", "way", "tests", "of", "goal", "tool", "part")
FOLLOWING = (
    *KEY, "kind", "note", "approximate", "vocab", "hidden", "p20_ms", "p80_ms", "samples", "tflops",
    "gb_per_s", "ratio_floor", "ratio_best_peer", "at most", "seconds",
)  # fmt: skip
NOTABLE = 0.05  # relative change of a figure without a spread


def compare(before: Path, after: Path) -> str:
    """Markdown of all that changed, except times within their spread; environment changes first."""
    old, new = (read_results(path) for path in (before, after))
    lines = []
    devices = [result.environment["device"] for result in (old, new)]
    if devices[0] != devices[1]:
        lines += [f"Different devices ({devices[0]}; {devices[1]}): times do not compare.", ""]
    for name in dict.fromkeys([*old.environment, *new.environment]):
        was, now = old.environment.get(name), new.environment.get(name)
        if was != now and name not in ("device", "date"):
            lines += [f"- {name}: {was}, now {now}"]
    lines += ["", "| what | figure | before | after | after / before |", "|---|---|---|---|---|"]
    rows = [_named_rows(result) for result in (old, new)]
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        for cells in _moves(rows[0].get(name), rows[1].get(name)):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _named_rows(results: Results) -> dict[str, Row]:
    """All rows of cases and tables, by the columns that identify them."""
    found = {}
    for title, rows in {"": results.rows, **results.tables}.items():
        for row in rows:
            found["; ".join(filter(None, [title, *(row.get(name) for name in NAMES)]))] = row
    return found


def _moves(old: Row | None, new: Row | None) -> Iterator[tuple[str, str, str, str]]:
    if old is None or new is None:
        yield ("row", "absent", "added", "") if old is None else ("row", "", "removed", "")
        return
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if name in (*NAMES, *FOLLOWING) or not _moved(was, now):
            continue
        if name == "time_ms" and was is not None and now is not None and _spreads_meet(old, new):
            continue
        both = isinstance(was, float) and isinstance(now, float) and was
        yield name, _cell(was), _cell(now), f"{now / was:.2f}" if both else ""


def _moved(was: Any, now: Any) -> bool:
    if isinstance(was, float) and isinstance(now, float):
        alike = math.isclose(was, now, rel_tol=NOTABLE) or (math.isnan(was) and math.isnan(now))
        return not alike
    return was != now


def _spreads_meet(old: Row, new: Row) -> bool:
    return old["p20_ms"] <= new["p80_ms"] and new["p20_ms"] <= old["p80_ms"]


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _cpu() -> str:
    """The processor's name, where Linux says it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _output(*command: str) -> str:
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
