"""Runs the tests in a process of their own, stopped at a time limit."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parent.parent


def pytest_row(name: str, selected: Sequence[str], limit: float, output: Path) -> report.Row:
    """Counts of one pytest run; its output goes to tests.txt. Stopped at `limit` seconds."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *selected]
    code, text = run_limited(command, limit)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "tests.txt").open("a", encoding="utf-8") as file:
        file.write(f"{' '.join(command[1:])}\n{text}\n")
    found = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error)", text)}
    counts = {kind: found.get(kind, 0) for kind in ("passed", "failed", "error")}
    status = {0: "ok", 1: "failed", None: f"stopped after {limit:.0f} s"}.get(code, f"rc {code}")
    seconds = time.monotonic() - begun
    return {"tests": name, "status": status, **counts, "seconds": round(seconds, 1)}


def run_limited(
    command: Sequence[str], limit: float, variables: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit status (None if stopped at the limit) and output of a command run in the project."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, **(variables or {})},
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        text, _ = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return None, text
