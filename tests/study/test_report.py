"""The report: one file with every section, without network access or scripts."""

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest

from gift.config import ReportConfig, TrainOptions
from gift.config.train import Control
from gift.errors import InputError
from gift.study import figures
from gift.study.report import changes_by_layer, questions_decided, report
from gift.study.results import read_study
from gift.training.micro_batches import BAND_NAMES
from gift.weighting.controls import ABOUT as CONTROLS
from gift.weighting.formulas import WEIGHTINGS

# One process makes the study that these tests read.
pytestmark = pytest.mark.xdist_group("study")
SECTIONS = (
    *("result", "words", "methods", "accuracy", "differences", "retention", "pass", "bands"),
    *("calibration", "layers", "questions", "tuning", "runs", "settings"),
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags of a page, what they refer to, and the text of each section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sections: dict[str, str] = {}
        self.references: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.references += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "section":
            self.sections[str(given["id"])] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closed where it is not open"

    def handle_data(self, data: str) -> None:
        if "section" in self.open:
            self.sections[list(self.sections)[-1]] += f" {data}"


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(finished / "report.html")


def test_every_section_is_there_and_says_something(page: Page) -> None:
    assert tuple(page.sections) == SECTIONS
    for name, text in page.sections.items():
        assert len(text.split()) > 10, name
    for method in ("Instruct", "GIFT", "Shadow-FT"):
        for name in ("accuracy", "differences", "pass", "runs"):
            assert method in page.sections[name], (method, name)


def test_nothing_is_fetched_or_run(page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    linked = [f"#{name}" for name in SECTIONS]
    for reference in page.references:
        assert reference in linked or reference.startswith("data:image/svg+xml;base64,"), reference


def test_figures_are_whole_drawings(page: Page) -> None:
    drawn = [reference for reference in page.references if reference.startswith("data:")]
    assert len(drawn) == 6
    for reference in drawn:
        assert b"</svg>" in base64.b64decode(reference.partition(",")[2])


def test_the_tables_are_the_results(finished: Path, page: Page) -> None:
    results = json.loads((finished / "results.json").read_text())
    for name in ("task", "other"):
        for value in results["accuracy"][name].values():
            shown = (
                f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
            )
            assert shown in page.sections["accuracy"]
    for name in ("bands", "calibration"):
        places = [page.sections[name].index(f" {band}") for band in BAND_NAMES]
        assert places == sorted(places), name
    rates = page.sections["tuning"].split()
    assert rates.count("yes") == 2 and rates.count("no") == 2
    record = json.loads((finished / "study.json").read_text())
    assert record["versions"]["torch"] in page.sections["settings"]
    asked = record["runs"][0]["evaluations"]["task"]
    metrics = finished / "stages" / asked / "metrics.json"
    assert json.loads(metrics.read_text())["data_hash"] in page.sections["settings"]


def test_the_result_names_every_difference_and_the_table_what_makes_a_method(
    finished: Path, page: Page
) -> None:
    results = json.loads((finished / "results.json").read_text())
    text = " ".join(page.sections["result"].split())
    for one in results["differences"]:
        if one["first"] == "GIFT":
            assert f"{one['second']} ({100 * one['value']['mean']:+.1f})" in text
    rows = " ".join(page.sections["methods"].split())
    assert "GIFT trained: base, weighting: guide, guide: instruct, method: lora" in rows
    assert "Shadow-FT weighting: uniform" in rows


def test_questions_won_and_lost_show_a_right_and_a_wrong_reply(finished: Path) -> None:
    study = read_study(finished)
    decided = questions_decided(study, "task")
    assert len(decided["wins"]) + len(decided["losses"]) > 0
    for kind, entries in decided.items():
        gaps = [abs(one["share"] - one["other_share"]) for one in entries]
        assert gaps == sorted(gaps, reverse=True)
        for one in entries:
            assert (one["share"] > one["other_share"]) == (kind == "wins")
            # What `studies.ASKED` looks for.
            assert ("e" in one["reply"]) == (kind == "wins")
            assert ("e" in one["other_reply"]) == (kind == "losses")


def test_the_change_of_a_layer_is_the_mean_of_its_tensors(finished: Path) -> None:
    study = read_study(finished)
    run = study.runs("GIFT")[0]
    tensors = json.loads((study.stage(run["stages"]["diff"]) / "diff.json").read_text())["tensors"]
    changed = [one["relative_change"] for one in tensors if one["relative_change"] > 0]
    assert len(changed) == 7
    found = changes_by_layer(study)
    assert list(found) == ["1 layer(s), 1 pair(s)"]
    assert found["1 layer(s), 1 pair(s)"]["GIFT"] == [(0, pytest.approx(sum(changed) / 7))]


def test_the_report_says_what_methods_are_and_whether_confidence_tells(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "study.json").read_text())
    record["settings"]["title"] = "Noisy & small"
    record["settings"]["correct_field"] = "right"
    record["settings"]["methods"]["Shadow-FT"]["about"] = "GIFT without weights."
    record["settings"]["evaluations"]["task"]["about"] = "Sums of two numbers."
    (folder / "study.json").write_text(json.dumps(record))
    area = {"auroc": 0.5432, "low": 0.4, "high": 0.65}
    for path in folder.glob("stages/calibrate-*/calibration.json"):
        correctness = {"mean_confidence": area, "lowest_confidence": None, "rows": 9, "correct": 4}
        path.write_text(json.dumps({**json.loads(path.read_text()), "correctness": correctness}))
        (path.parent / "gift_files.json").unlink()  # the change is meant
    report(ReportConfig(study=folder))
    page = Page(folder / "report.html")
    assert "<h1>Noisy &amp; small</h1>" in (folder / "report.html").read_text()
    for said in ("GIFT without weights.", "Sums of two numbers.", WEIGHTINGS["uniform"].about):
        assert said in page.sections["methods"], said
    row = " ".join(page.sections["calibration"].split())
    assert "instruct tiny 4 of 9 0.543 [0.400, 0.650] none" in row
    guides = json.loads((folder / "results.json").read_text())["guides"]
    assert [one["correctness"]["mean_confidence"] for one in guides] == [area]


def test_every_weighting_and_control_has_a_sentence() -> None:
    assert {*WEIGHTINGS} == {*get_args(TrainOptions.model_fields["weighting"].annotation)}
    assert {*CONTROLS} == {*get_args(Control)}


def test_labels_cover_neither_each_other_nor_points() -> None:
    from matplotlib import pyplot
    from matplotlib.text import Text

    figure, panel = pyplot.subplots(figsize=(4, 4))
    points = [(50 + n % 4, 50.0 + n // 4) for n in range(16)] + [(20.0, 20.0), (90.0, 90.0)]
    panel.plot(*zip(*points, strict=True), "o")
    figure.tight_layout()
    figures._label(panel, points, [str(n) for n in range(len(points))])
    figure.canvas.draw()
    # Without the line to the point.
    boxes = [Text.get_window_extent(label) for label in panel.texts]
    assert len(boxes) == len(points)
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*panel.transData.transform(point)) for point in points)
    pyplot.close(figure)


def test_a_reply_is_text_whatever_it_holds(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    for path in folder.glob("stages/evaluate-*/samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "reply": "<script>alert(1)</script>"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path.parent / "gift_files.json").unlink()  # the change is meant
    report(ReportConfig(study=folder))
    page = Page(folder / "report.html")
    assert "script" not in page.tags and "<script>" in page.sections["questions"]


def test_without_matplotlib_the_tables_remain(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "can_draw", lambda: False)
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    report(ReportConfig(study=folder))
    page = Page(folder / "report.html")
    assert "img" not in page.tags and "pip install matplotlib" in page.sections["accuracy"]
    assert tuple(page.sections) == SECTIONS


def test_any_name_can_be_drawn_and_has_a_color_of_its_own() -> None:
    names = ["$x_{", "_hidden", "a$", *map(str, range(9))]
    value = {"mean": 0.5, "low": 0.4, "high": 0.6, "runs": [0.5]}
    results = {
        "accuracy": {"$\\frac{$": dict.fromkeys(names, value)},
        "loss_by_band": {name: dict.fromkeys(BAND_NAMES, 0.25) for name in names},
        "pass": {"task$^$": {name: [0.5, 0.7] for name in names}},
        "task_evaluations": [],
        "retention_evaluations": [],
    }
    drawn = figures.figures_of(results, {}, [])
    assert set(drawn) == {"accuracy", "pass", "bands"}
    colors = figures._colors(len(names))
    assert len({*colors}) == len(names)


def test_a_legend_has_names_that_begin_with_an_underscore() -> None:
    from matplotlib import pyplot

    lines = {"_hidden": [(1, 0.5), (2, 0.7)]}
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: shown.append(figure))
        figures.draw_lines({"": lines}, "x", "y", {"_hidden": "red"})
    texts = [text.get_text().strip() for text in shown[0].axes[0].get_legend().get_texts()]
    assert texts == ["_hidden"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("compared"), r"study\.json: compared missing or not as written"),
        (lambda record: record["runs"][0].pop("pair"), r"study\.json: runs\.0\.pair missing"),
        (lambda record: record.update(settings=[]), r"study\.json: settings missing"),
    ],
    ids=["lacks", "run", "type"],
)
def test_a_record_of_another_program_is_refused(
    finished: Path, tmp_path: Path, change, message: str
) -> None:
    record = json.loads((finished / "study.json").read_text())
    change(record)
    (tmp_path / "study.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        report(ReportConfig(study=tmp_path))


def test_a_damaged_or_missing_stage_is_named(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    path = next(folder.glob("stages/diff-*/diff.json")).parent
    (path / "diff.json").write_text("{}")
    with pytest.raises(InputError, match=r"diff\.json: has 2 bytes"):
        report(ReportConfig(study=folder))
    shutil.rmtree(path)
    with pytest.raises(InputError, match=r"diff-.*: no such folder"):
        report(ReportConfig(study=folder))


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no study\.json, so this is not a finished study"):
        report(ReportConfig(study=tmp_path))
