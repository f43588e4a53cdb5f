"""The demo at a fraction of its training: a world, a study of it, a report at the end."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from gift.config import DemoConfig
from gift.demo import main as demo_module
from gift.demo.main import METHODS, demo
from gift.errors import InputError
from gift.study import run as study_run


def test_the_demo_is_a_study_that_explains_itself_and_ends_with_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (demo_module, study_run):
        monkeypatch.setattr(module, "worker_pool", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(demo_module, "TASK_ROWS", 24)
    output = tmp_path / "demo"
    options = {"pairs": 1, "seeds": 1, "workers": 1, "scale": 0.01, "questions": 4}
    results = demo(DemoConfig(output=output, **options))
    printed = capsys.readouterr().out
    assert printed.startswith("A tiny instruct model is taught a task")
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    last = re.sub(r"\s+", " ", printed.strip().splitlines()[-1])
    assert last.startswith(f"The report is {output / 'study' / 'report.html'}")
    for name, methods in results["accuracy"].items():
        assert [*methods] == ["Instruct", *METHODS], name
        assert all(0 <= value["mean"] <= 1 for value in methods.values())
    shares = results["loss_by_band"]
    # Whatever the models: weighting by q takes loss from tokens of low q.
    assert shares["GIFT"]["q < 0.1"] < shares["Shadow-FT"]["q < 0.1"]
    assert not shares["GIFT-BaseT"]
    assert yaml.safe_load((output / "study.yaml").read_text())["methods"] == METHODS
    assert (output / "study" / "report.html").stat().st_size > 10_000
    before = json.loads((output / "study" / "results.json").read_text())
    assert demo(DemoConfig(output=output, **options))["accuracy"] == before["accuracy"]
    assert "all was finished before" in capsys.readouterr().out


def test_a_folder_that_is_no_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="exists and is not a demo"):
        demo(DemoConfig(output=tmp_path))
