"""One run of the GPU suite: its results, its time, and how it goes on where a step does not end."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.measure import empty_row
from benchmarks.turns import LOST, Settings

CASE_BY_CASE = ("benchmarks", "more")  # parts that a new process goes on with
GRACE_SECONDS = 30  # that a step may take after the budget's end


@dataclass
class Suite:
    """One run: its parts, the one it is at, where results go, and its time budget."""

    results: report.Results
    settings: Settings
    started: float
    seconds: float
    dry_run: bool
    parts: Sequence[str]
    part: str = ""

    def left(self) -> float:
        """Seconds until the budget ends."""
        return self.started + self.seconds - time.monotonic()

    def add(self, table: str, *rows: report.Row) -> None:
        """Adds rows to a table and writes all results."""
        self.results.tables.setdefault(table, []).extend(rows)
        self.results.save()
        for row in rows:
            print("  " + ", ".join(f"{name}: {_short(value)}" for name, value in row.items()))

    @contextmanager
    def limited(self, seconds: float, case: Case | None = None) -> Iterator[None]:
        """A step that is given up after so many seconds, and with it this process.

        A kernel or a compiler that hangs cannot be interrupted from Python. What was measured is on
        disk; a new process goes on, without the provider that was running.
        """
        ended = self.left() + GRACE_SECONDS < seconds
        limit = max(1.0, min(seconds, self.left() + GRACE_SECONDS))
        reason = "the budget ended" if ended else f"failed: stopped after {limit:.0f} s"
        timer = threading.Timer(limit, self.give_up, (reason, None if ended else case))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def give_up(self, reason: str, case: Case | None = None) -> None:
        """Says what did not end, and where, and goes on in a new process."""
        faulthandler.dump_traceback(all_threads=True)
        running = self.settings.running
        if case is not None and running is not None:
            row = {"case": case.label, **empty_row(case, running)}
            self.results.rows.append({**row, "status": f"{reason} {LOST}"})
        else:
            part = self.part if case is None else case.label
            self.add("not run", {"part": part, "reason": reason})
        self.go_on_in_a_new_process()

    def go_on_in_a_new_process(self) -> None:
        """Continues with the parts after this one, and the rest of this one if it has cases."""
        parts = self.parts[self.parts.index(self.part) :]
        parts = parts if self.part in CASE_BY_CASE else parts[1:]
        self.results.save()
        print(f"{LOST}: {', '.join(parts) or 'nothing'} left for a new process", flush=True)
        options = ["--dry-run"] if self.dry_run else []
        options += ["--resume", "--output", str(self.results.output), "--parts", ",".join(parts)]
        options += ["--budget-minutes", str(max(0.0, self.left()) / 60)]
        command = [sys.executable, "-m", "benchmarks.gpu_suite", *options]
        os.execv(command[0], command)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
