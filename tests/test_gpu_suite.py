"""The GPU suite without a GPU: its dry run, what it calls a failure, and steps that do not end."""

import math
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import counted, goals, gpu_suite, gpu_summary, readme, report, turns
from benchmarks.cases import CECase, gpu_cases, toy_cases
from benchmarks.measure import measure_case
from benchmarks.native_tests import pytest_row
from benchmarks.providers import own_providers
from benchmarks.suite import Suite
from benchmarks.turns import LOST, Settings
from gift_kernels.linear_ce.triton.chunk_size import Shape

CPU = Settings(torch.device("cpu"), seconds=0.0, rounds=(1, 1))


def test_the_suite_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    output = tmp_path / "suite"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--output", output]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 60, "seconds of a processor, also of a busy one"
    summary = finished.stdout[finished.stdout.index("# CPU") :]
    assert len(summary) <= 10_001
    for part in ("stored results | ok", "8 of 8 within budget", "candidates: ", "train step"):
        assert part in summary, part
    written = report.read_results(output)
    assert written.tables["goals"] and written.tables["end to end"]
    assert {row["status"] for row in written.rows if row["kind"] == "ours"} == {"ok"}
    assert {row["status"] for row in written.rows if row["kind"] == "candidate"} == {"ok"}
    assert {row["call"] for row in written.tables["host time"]} >= {"frozen head", "with a guide"}


GOOD = {
    "tests": [{"tests": "kernels", "status": "ok", "passed": 3, "failed": 0, "error": 0}],
    "accuracy against float64": [{"case": "c", "verdict": "ok"}],
    "compute-sanitizer": [
        {"tool": "memcheck", "found": "ERROR SUMMARY: 0 errors"},
        {
            "tool": "racecheck",
            "found": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        },
    ],
    "end to end": [{"way": "gift", "status": "ok"}, {"way": "Liger", "status": "failed: no"}],
    "not run": [{"part": "sanitizer", "reason": "the budget ended"}],
}
BAD = {
    "tests": {"tests": "kernels", "status": "rc 4", "passed": 0, "failed": 0, "error": 0},
    "accuracy against float64": {"case": "c", "verdict": "wrong: d_hidden off by 1"},
    "compute-sanitizer": {"tool": "memcheck", "found": "ERROR SUMMARY: 10 errors"},
    "end to end": {"way": "gift", "status": "wrong"},
    "not run": {"part": "end_to_end", "reason": "failed: RuntimeError: no"},
}


def test_the_suite_says_so_where_something_is_wrong(tmp_path: Path) -> None:
    rows = [{"kind": "ours", "status": "ok"}, {"kind": "peer", "status": "wrong: loss"}]
    rows += [{"kind": "candidate", "status": "failed: out of shared memory"}]
    good = report.Results(tmp_path, {}, rows=rows, tables=GOOD)
    assert not gpu_summary.failures(good)
    assert gpu_summary.failures(replace(good, rows=[]))
    assert gpu_summary.failures(replace(good, rows=[*rows, {"kind": "ours", "status": "wrong: q"}]))
    absent = {"kind": "ours", "status": "not installed: No module named 'gift_kernels'"}
    assert gpu_summary.failures(replace(good, rows=[*rows, absent])) == [absent]
    for name, row in BAD.items():
        bad = replace(good, tables={**GOOD, name: [*GOOD[name], row]})
        assert gpu_summary.failures(bad) == [row], name
    assert gpu_summary.told(BAD["tests"]) == "kernels, rc 4"
    late = {"part": "accuracy", "reason": "the budget ended; 3 cases were not begun"}
    assert gpu_summary.failures(replace(good, tables={**GOOD, "not run": [late]})) == [late]


def test_the_suite_goes_on_without_who_took_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(case, inputs):
        raise RuntimeError("an illegal memory access")

    case = toy_cases()[0]
    ours = next(provider for provider in own_providers() if provider.name == "gift eager")
    monkeypatch.setattr(turns, "device_works", lambda device: False)
    rows = measure_case(case, CPU, [ours, replace(ours, name="culprit", prepare=fail), ours])
    status = f"failed: RuntimeError: an illegal memory access {LOST}"
    assert [(row["provider"], row["status"]) for row in rows] == [("culprit", status)]

    environment = {"device": "GPU", "date": "d"}
    results = report.Results(tmp_path, environment, rows=[{"case": case.label, **rows[0]}])
    parts = ("tests", "benchmarks", "more")
    suite = Suite(results, CPU, 0.0, math.inf, False, parts, part="benchmarks")
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    replace(suite, seconds=0.0).go_on_in_a_new_process()
    assert started[0][-6:] == [
        "--output", str(tmp_path), "--parts", "benchmarks,more", "--budget-minutes", "0.0",
    ]  # fmt: skip

    measured: list[str] = []
    known = [ours, replace(ours, name="culprit")]
    monkeypatch.setattr(gpu_suite, "providers_of", lambda case: known)

    def add_case(results, case, settings, providers) -> bool:
        measured.extend(provider.name for provider in providers)
        results.rows.append({"case": case.label, "provider": "gift eager", "status": "ok"})
        return True

    monkeypatch.setattr(gpu_suite, "add_case", add_case)
    for _ in range(2):  # the second time there is nothing left to do
        gpu_suite._run_cases(suite, [case])
    assert measured == ["gift eager"]


def new_suite(folder: Path, part: str) -> Suite:
    results = report.Results(folder, {"device": "GPU", "date": "d"})
    return Suite(results, replace(CPU), 0.0, math.inf, False, ("warm", part, "more"), part)


@pytest.mark.parametrize("known", [True, False], ids=["provider known", "nobody running"])
def test_a_step_that_does_not_end_is_given_up(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its provider is left out from then on; where none was running, its case."""
    gone_on, commands = threading.Event(), []

    def exec_(path: str, command: list[str]) -> None:
        commands.append(command)
        gone_on.set()

    monkeypatch.setattr(os, "execv", exec_)
    suite, case = new_suite(tmp_path, "benchmarks"), toy_cases()[0]
    suite.settings.running = own_providers()[0] if known else None
    with suite.limited(0.0, case):
        assert gone_on.wait(20)
    assert commands[0][-3:-1] == ["benchmarks,more", "--budget-minutes"]
    written = report.read_results(tmp_path)
    if known:
        (row,) = written.rows
        assert row["status"] == f"failed: stopped after 1 s {LOST}" and row["kind"] == "ours"
        assert gpu_summary.failures(written) and goals.judge(written.rows)
    else:
        assert written.tables["not run"] == [
            {"part": case.label, "reason": "failed: stopped after 1 s"}
        ]
    gone_on.clear()
    with suite.limited(0.0):
        pass
    assert not gone_on.wait(1.2)


def test_the_end_of_the_budget_is_nobodys_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_on = threading.Event()
    monkeypatch.setattr(os, "execv", lambda *_: gone_on.set())
    suite = replace(new_suite(tmp_path, "benchmarks"), seconds=0.0)
    suite.settings.running = own_providers()[0]
    with suite.limited(90.0, toy_cases()[0]):
        assert gone_on.wait(20)
    written = report.read_results(tmp_path)
    assert not written.rows and not gpu_summary.failures(written, measured=False)
    assert written.tables["not run"] == [{"part": "benchmarks", "reason": "the budget ended"}]


def test_whole_stages_that_take_too_long_keep_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"stage": "annotate", "model": "m", "way": "gift", "status": "ok"}

    def run(command: list[str], limit: float) -> tuple[None, str]:
        folder = Path(command[command.index("--output") + 1])
        report.Results(folder, {"device": "", "date": ""}, tables={"end to end": [row]}).save()
        return None, ""

    monkeypatch.setattr(gpu_suite, "run_limited", run)
    suite = replace(new_suite(tmp_path, "end_to_end"), started=gpu_suite.time.monotonic())
    gpu_suite.run_end_to_end(replace(suite, seconds=100.0))
    written = report.read_results(tmp_path)
    assert written.tables["end to end"] == [row]
    assert written.tables["not run"][0]["reason"].startswith("stopped after 1")


def test_a_file_that_cannot_be_imported_stops_no_other_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_a.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "test_b.py").write_text("def test_b():\n    pass\n")
    row = pytest_row("both", [str(tmp_path)], 60, tmp_path)
    assert (row["status"], row["passed"], row["error"]) == ("failed", 1, 1)
    assert "ERROR" in capsys.readouterr().out


def test_goals_are_judged_for_every_head_they_name() -> None:
    case = CECase("llama-3.1-8b", 8192)
    row = {**case.describe(), "provider": "gift triton", "status": "ok", "data": "peaked"}
    measured = {"ratio_floor": 1.05, "ratio_best_peer": 1.2, "peak_mb": 200.0}
    others = [
        {**row, "provider": "gift eager", "time_ms": 13.0},
        {**row, "provider": "full logits", "time_ms": 10.0},
    ]
    judged = goals.judge([{**row, **measured}, *others])
    verdicts = {(one["goal"], one["case"]): one["met"] for one in judged}
    assert verdicts["frozen head, × lower bound", "llama-3.1-8b, peaked"] == "yes"
    assert verdicts["frozen head, 8192 tokens, × the fastest other", "llama-3.1-8b, peaked"] == "no"
    assert verdicts["frozen head, × lower bound", "gemma-2-9b"] == "not measured"
    assert verdicts["eager, × full logits", "llama-3.1-8b, peaked"] == "no"
    assert (
        verdicts["merge, bfloat16 factors, rank to 64, × a copy", "llama-3.1-8b up"]
        == "not measured"
    )


def test_the_time_of_the_host_is_judged() -> None:
    rows = [{"call": "frozen head", "tokens": tokens, "µs": 700.0 + tokens} for tokens in (1, 256)]
    rows += [{"call": "lora_merge_, bfloat16 factors", "tokens": 0, "µs": 30.0}]
    assert [row["met"] for row in goals.judge_host(rows)] == ["no", "yes", "not measured"]


def test_the_tests_to_run_natively_are_there() -> None:
    for name in (*gpu_suite.GOLDEN_TESTS, *gpu_suite.KERNEL_TESTS):
        assert (report.ROOT / name).is_file(), name


def test_every_goal_of_time_has_a_count() -> None:
    """And the count of a case that was measured is what was measured."""
    (folder,) = [one for one in readme.newest() if "cpu" not in one.name]
    rows = {
        (row["goal"], row["case"]): row for row in counted.table(report.read_results(folder).rows)
    }
    names = {goal.name for goal in goals.GOALS if not goal.name.endswith((" MB", " of q"))}
    assert {goal for goal, _ in rows} == names
    missing = {goal for (goal, _), row in rows.items() if row["counted"] is None}
    assert missing <= {"frozen head, 256 tokens, × the fastest other"}, "a time was measured"
    measured = counted.call_time(counted.work_of("llama-3.1-8b"), 8192, Shape(2048, 25088))
    measured /= 2 * counted.product(counted.work_of("llama-3.1-8b"), 8192)
    assert measured == pytest.approx(1.1325, rel=0.015)


def test_what_goals_are_about_comes_first() -> None:
    """Six minutes are enough for little more than the first cases."""
    rows = [
        {**case.describe(), "provider": provider, "status": "ok", "case": case.label}
        for case in gpu_cases(quick=True)
        for provider in ("gift triton", "gift eager", "gift triton, in place")
    ]
    assert all(any(map(goal.chosen, rows)) for goal in goals.GOALS if "tokens" not in goal.name)
