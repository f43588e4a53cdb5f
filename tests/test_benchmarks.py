"""The benchmarks at toy sizes: every provider that runs here is right, and results are whole."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.cases import CECase, toy_cases
from benchmarks.measure import Settings, measure_case
from benchmarks.providers import own_providers

CPU = Settings(torch.device("cpu"), seconds=0.0, rounds=(1, 1))


@pytest.mark.parametrize("case", toy_cases(), ids=lambda case: case.label)
def test_whoever_runs_here_is_right(case) -> None:
    rows = measure_case(case, CPU)
    by_name = {row["provider"]: row for row in rows}
    assert any(row["kind"] == "ours" and row["status"] == "ok" for row in rows)
    for name, row in by_name.items():
        assert row["status"] in ("ok", "not installed") or row["status"].startswith("not run: "), (
            name,
            row["status"],
        )
        assert ("time_ms" in row) == (row["status"] == "ok")


@pytest.mark.parametrize("wrong", ["zero", "unweighted"])
def test_a_wrong_provider_is_shown_as_wrong_without_a_time(wrong: str) -> None:
    ours = next(provider for provider in own_providers() if provider.name == "gift eager")

    def prepare(case, inputs):
        if wrong == "unweighted":
            return ours.prepare(replace(case, weighting="uniform"), inputs)
        right = ours.prepare(case, inputs)
        return lambda: right() * 0

    (row,) = measure_case(CECase("toy", 40, "float32"), CPU, [replace(ours, prepare=prepare)])
    assert row["status"].startswith("wrong: ")
    assert "time_ms" not in row


def test_results_are_written_and_compared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu"]
    subprocess.run(
        [*command, "--quick", "--seconds", "0.05", "--output", tmp_path / "a"], check=True
    )
    written = json.loads((tmp_path / "a" / report.RESULTS_FILE).read_text())
    with (tmp_path / "a" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(written["rows"])
    assert {"torch", "commit", "date", "device"} <= written["environment"].keys()
    for name in ("time", "memory", "ratios"):
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for row in written["rows"]:
        if "time_ms" in row:
            row["time_ms"] *= 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / report.RESULTS_FILE).write_text(json.dumps(written))
    table = report.compare(tmp_path / "a", tmp_path / "b")
    assert "| 2.00 |" in table and "do not compare" not in table
