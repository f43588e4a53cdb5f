"""The benchmarks at toy sizes: every provider that runs here is right, and results are whole."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, goals, gpu_suite, measure, peers, readme, report
from benchmarks.cases import CECase, toy_cases
from benchmarks.measure import Settings, check, gate_truth, measure_case
from benchmarks.providers import own_providers, providers_of

CPU = Settings(torch.device("cpu"), seconds=0.0, rounds=(1, 1))


@pytest.mark.parametrize("case", toy_cases(), ids=lambda case: case.label)
def test_whoever_runs_here_is_right(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GATE_TOKENS", 16)  # less than a case has, as for real heads
    quick = [one for one in providers_of(case) if one.package in (None, "peft")]
    rows = measure_case(case, CPU, quick)
    by_name = {row["provider"]: row for row in rows}
    assert any(row["kind"] == "ours" and row["status"] == "ok" for row in rows)
    for name, row in by_name.items():
        assert row["status"] in ("ok", "not installed") or row["status"].startswith("not run: "), (
            name,
            row["status"],
        )
        assert ("time_ms" in row) == (row["status"] == "ok")


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("weighting", ["offline", "guide", "uniform", "self"])
def test_peers_mean_what_the_specification_means(
    weighting: str, trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger in the interpreter and CCE without a compiler; other peers need a GPU."""
    monkeypatch.setattr(measure, "GATE_TOKENS", 16)
    case = CECase("toy", 24, "float32", weighting=weighting, trainable=trainable)  # pyright: ignore
    wanted = {"Liger FLCE, chunk 1", "Liger scaled CE", "CCE, torch.compile"}
    wanted |= {"Liger FLCE, token scaling"} if weighting == "self" else set()
    chosen = [peer for peer in peers.PROVIDERS if peer.name in wanted and not peer.missing()]
    assert len(chosen) == len(wanted), "install the extra 'bench'"
    inputs, truth, yardstick = gate_truth(case, CPU)
    with torch.compiler.set_stance("force_eager"):
        for peer in chosen:
            status, errors = check(peer, case, inputs, truth, yardstick)
            assert status == "ok", (peer.name, status)
            assert max(errors.values()) < 1e-5


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
    command += ["--quick", "--seconds", "0.05", "--output", tmp_path / "a"]
    # As on a user's machine: without the interpreter, which conftest.py asks for.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment)
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


def test_the_suite_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    output = tmp_path / "suite"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--output", output]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = finished.stdout[finished.stdout.index("# CPU") :]
    assert len(summary) <= 10_001
    for part in ("stored results | ok", "8 of 8 within budget", "candidates: ", "train step"):
        assert part in summary, part
    written = report.read_results(output)
    assert written.tables["goals"] and written.tables["end to end"]
    assert {row["status"] for row in written.rows if row["kind"] == "ours"} == {"ok"}


GOOD = {
    "tests": [{"tests": "kernels", "status": "ok", "passed": 3, "failed": 0, "error": 0}],
    "accuracy against float64": [{"case": "c", "verdict": "ok"}],
    "compute-sanitizer": [{"tool": "memcheck", "found": "ERROR SUMMARY: 0 errors"}],
    "end to end": [{"way": "gift", "status": "ok"}, {"way": "Liger", "status": "failed: no"}],
    "not run": [{"part": "sanitizer", "reason": "the budget ended"}],
}
BAD = {
    "tests": {"tests": "kernels", "status": "rc 4", "passed": 0, "failed": 0, "error": 0},
    "accuracy against float64": {"case": "c", "verdict": "wrong: d_hidden off by 1"},
    "compute-sanitizer": {"tool": "memcheck", "found": "ERROR SUMMARY: 5 errors"},
    "end to end": {"way": "gift", "status": "wrong"},
    "not run": {"part": "accuracy", "reason": "failed: RuntimeError: no"},
}


def test_the_suite_says_so_where_something_is_wrong(tmp_path: Path) -> None:
    rows = [{"kind": "ours", "status": "ok"}, {"kind": "peer", "status": "wrong: loss"}]
    good = report.Results(tmp_path, {}, rows=rows, tables=GOOD)
    assert not gpu_suite.failures(good)
    assert gpu_suite.failures(replace(good, rows=[]))
    assert gpu_suite.failures(replace(good, rows=[*rows, {"kind": "ours", "status": "wrong: q"}]))
    for name, row in BAD.items():
        bad = replace(good, tables={**GOOD, name: [*GOOD[name], row]})
        assert gpu_suite.failures(bad) == [row], name


def test_goals_are_judged_for_every_head_they_name() -> None:
    case = CECase("llama-3.1-8b", 8192)
    row = {**case.describe(), "provider": "gift triton", "status": "ok", "data": "peaked"}
    judged = goals.judge([{**row, "ratio_floor": 1.05, "ratio_best_peer": 1.2, "peak_mb": 200.0}])
    verdicts = {(one["goal"], one["case"]): one["met"] for one in judged}
    assert verdicts["frozen head, × one bare product", "llama-3.1-8b, peaked"] == "yes"
    assert verdicts["frozen head, × the fastest peer", "llama-3.1-8b, peaked"] == "no"
    assert verdicts["frozen head, × one bare product", "gemma-2-9b"] == "not measured"
    assert verdicts["merge, × a copy", "llama-3.1-8b up"] == "not measured"


def test_a_zero_gradient_disagrees_whatever_the_loss_is() -> None:
    loss, gradient = torch.tensor([3.0]), torch.full((8,), 1e-3)
    assert end_to_end.disagreement([loss, gradient], [loss, gradient]) == 0
    assert end_to_end.disagreement([loss, 0 * gradient], [loss, gradient]) == 1


def test_the_performance_section_of_the_readme_is_that_of_the_stored_results() -> None:
    section = readme.section(readme.newest())
    assert section in readme.README.read_text(encoding="utf-8"), "run python -m benchmarks readme"
    devices = [report.read_results(folder).environment["device"] for folder in readme.newest()]
    measured = any(not device.startswith("CPU") for device in devices)
    assert ("Not measured on a GPU yet" in section) is not measured
