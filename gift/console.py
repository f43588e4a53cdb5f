"""What the program prints: tables on standard output, progress on standard error."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console()
error_console = Console(stderr=True)


class Bar:
    """One progress bar; `advance` moves it, `note` changes the text behind it."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


@contextmanager
def progress(description: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A progress bar with its remaining time, on standard error where that is a terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=error_console,
        disable=not (shown and error_console.is_terminal),
    ) as bars:
        yield Bar(bars, bars.add_task(description, total=total, completed=done, note=""))


@contextmanager
def quiet() -> Iterator[None]:
    """Prints nothing inside: for stages that are steps of something larger."""
    before = console.quiet, error_console.quiet
    console.quiet = error_console.quiet = True
    try:
        yield
    finally:
        console.quiet, error_console.quiet = before


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold")
    console.print(table)


def print_summary(title: str, summary: Mapping[str, Any]) -> None:
    """Prints a stage's summary as a two-column table."""
    rows = [
        (key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
        for key, value in summary.items()
    ]
    print_table(title, ("", "value"), rows)
