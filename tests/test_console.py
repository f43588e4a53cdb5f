"""Tables at every width: names and numbers stay whole, columns move to further tables."""

import io
import re

import pytest
from rich.console import Console

from gift import console

METHODS = ("Instruct", "Instruct-SFT", "Shadow-FT", "GIFT-BaseT", "GIFT")
MEASURES = (
    *("task, sampled", "task, greedy", "own worked style", "constraint kept on task"),
    *("other tasks, exact", "other tasks, format"),
)


def printed(monkeypatch: pytest.MonkeyPatch, width: int, terminal: bool, *table) -> str:
    options = {"force_terminal": True, "color_system": None} if terminal else {}
    screen = Console(width=width, file=io.StringIO(), **options)
    monkeypatch.setattr(console, "console", screen)
    console.print_table(*table)
    return re.sub("\x1b\\[[0-9;]*m", "", screen.file.getvalue())


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_names_and_numbers_are_whole_at_every_width(
    width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(name, *(f"{i}{j}.5 ± 0.{j}" for j in range(6))) for i, name in enumerate(METHODS)]
    text = printed(monkeypatch, width, terminal, "Accuracy", ("", *MEASURES), rows)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    cells = {cell.strip() for cell in re.split("[│┃\n]", text)}
    for row in rows:
        assert set(row) <= cells, row
    words = set(re.split(r"[\s│┃]+", text))
    assert {word for measure in MEASURES for word in measure.split()} <= words
    if width == 200:
        assert text.count(METHODS[1]) == 1


def test_long_names_and_values_fold_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/a/" + "very-long-folder/" * 6 + "model"
    for row in ((path, "1.5"), ("output", path), (path, path)):
        text = printed(monkeypatch, 80, False, "Summary", ("", "value"), [row])
        assert max(map(len, text.splitlines())) <= 80
        body = [line.split("│")[1:3] for line in text.splitlines() if line.startswith("│")]
        for place, cell in enumerate(row):
            assert "".join(line[place].strip() for line in body) == cell


def test_brackets_are_text_and_a_title_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    title = "a title [red] of a/" + "long/" * 30
    text = printed(monkeypatch, 80, False, title, ("", "n"), [("[bold]x[/bold]", "[1, 2]")])
    assert title in text and "[bold]x[/bold]" in text and "[1, 2]" in text
