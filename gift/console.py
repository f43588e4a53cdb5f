"""What the program prints: tables on standard output, progress on standard error."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
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
from rich.text import Text

console = Console()
error_console = Console(stderr=True)


class Bar:
    """One progress bar; `advance` moves it, `note` sets the text after it."""

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
    """Suppresses console output in the block, for stages that run within another command."""
    before = console.quiet, error_console.quiet
    console.quiet = error_console.quiet = True
    try:
        yield
    finally:
        console.quiet, error_console.quiet = before


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers.

    Nothing is truncated: headers wrap at words, and columns that do not fit the width go to a
    further table that repeats the first column.
    """
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    for part in _fitting_parts(columns, rows, console.width):
        table = Table()
        for number, (place, width) in enumerate(part):
            justify = "left" if number == 0 else "right"
            table.add_column(Text(columns[place]), justify=justify, width=width, overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[place]) for place, _ in part))
        console.print(table)


def _fitting_parts(
    columns: Sequence[str], rows: Sequence[Sequence[str]], available: int
) -> list[list[tuple[int, int]]]:
    """Splits the columns into tables that fit, each a list of (index, width) from the first column.

    A column is as wide as its header where all fit so, else as its longest cell or word.
    """
    cells = [[row[place] for row in rows] for place in range(len(columns))]
    whole = [max(map(cell_len, [name, *cells[i]])) for i, name in enumerate(columns)]
    if sum(whole) + 3 * len(whole) + 1 <= available:
        return [list(enumerate(whole))]
    narrow = [max(map(cell_len, [*name.split(), *cells[i], ""])) for i, name in enumerate(columns)]
    room = available - 1 - (narrow[0] + 3)
    if room < max(narrow[1:], default=0) + 3:  # a name or path as long as the line: it folds
        narrow = [min(width, max(8, (available - 7) // 2)) for width in narrow]
        room = available - 1 - (narrow[0] + 3)
    parts: list[list[tuple[int, int]]] = []
    left = 0
    for place, width in list(enumerate(narrow))[1:]:
        if not parts or width + 3 > left:
            parts.append([(0, narrow[0])])
            left = room
        parts[-1].append((place, width))
        left -= width + 3
    return parts or [[(0, narrow[0])]]


def print_summary(title: str, summary: Mapping[str, Any]) -> None:
    """Prints a stage's summary as a two-column table."""
    rows = [
        (key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
        for key, value in summary.items()
    ]
    print_table(title, ("", "value"), rows)
