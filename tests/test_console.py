"""Tables at every width: names are never cut, numbers never broken, columns move."""

import io
import re

import pytest
from rich.console import Console

from gift import console
from gift.config import DemoConfig
from gift.demo import main as demo_main

METHODS = ("Instruct", "Instruct-SFT", "Shadow-FT", "GIFT-BaseT", "GIFT")
MEASURES = tuple(demo_main.MEASURES.values())


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


@pytest.mark.parametrize("drawn", [True, False])
def test_the_demo_says_what_it_made(
    drawn: bool, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_main, "can_draw", lambda: drawn)
    value = {"mean": 50.0, "sd": None}
    entry = {"method": "GIFT", "loss_by_band": {"q < 0.1": 0.2}}
    summary = {
        "means": {"GIFT": {name: value for name in MEASURES}},
        "advantage_of_gift": {"Instruct": {**value, "ahead": 1, "runs": 1}},
        "results": [entry, {**entry, "method": "Shadow-FT"}],
        "seconds": 60.0,
    }
    demo_main._print(DemoConfig(output=tmp_path), summary)
    out = capsys.readouterr().out
    assert ("accuracy.png" in out) and ("pip install matplotlib" in out) is not drawn
    assert ("no figures" in out) is not drawn
