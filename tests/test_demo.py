"""The demo at a fraction of its training: every method, measure and file is there."""

import json
from pathlib import Path

from gift.config import DemoConfig
from gift.demo.main import demo


def test_all_methods_are_adapted_measured_and_written(tmp_path: Path) -> None:
    demo(DemoConfig(output=tmp_path / "demo", pairs=1, seeds=1, workers=1, scale=0.01, questions=4))
    report = json.loads((tmp_path / "demo" / "results.json").read_text())
    names = ["Instruct", "Instruct-SFT", "Shadow-FT", "GIFT-BaseT", "GIFT"]
    assert [entry["method"] for entry in report["results"]] == names
    for measures in report["means"].values():
        assert all(0 <= value["mean"] <= 100 for value in measures.values())
    shares = {e["method"]: e["loss_by_band"] for e in report["results"] if "loss_by_band" in e}
    # Whatever the models: weighting by q takes loss from tokens of low q.
    assert shares["GIFT"]["q < 0.1"] < shares["Shadow-FT"]["q < 0.1"]
    for name in ("accuracy.png", "loss_by_band.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
