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
HANGS_SECONDS = 60  # after which a test's stack is printed
SHOWN_FAILURES = 20


def pytest_row(name: str, selected: Sequence[str], limit: float, output: Path) -> report.Row:
    """Counts of one pytest run; its output goes to tests.txt. Stopped at `limit` seconds.

    A file that cannot be imported, for want of a package say, stops no other. Failures are printed.
    """
    begun = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={HANGS_SECONDS}"]
    command += selected
    code, text = run_limited(command, limit)
    for line in re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)[:SHOWN_FAILURES]:
        print(f"  {line}", flush=True)
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
    """Exit status (None if stopped at the limit) and output of a command run in the project.

    It ends with whatever it started, also if this process is interrupted.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, **(variables or {})},
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    try:
        text, _ = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return None, text
