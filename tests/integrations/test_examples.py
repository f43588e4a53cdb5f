"""Every script in examples/ runs, learns and writes its output; none is longer than 60 lines."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "made"), [("own_loop", "trained"), ("trainer", "trained"), ("trl_sft", "merged")]
)
def test_an_example_runs(
    name: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path)])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    start = tmp_path / ("instruct" if made == "merged" else "base")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (start, tmp_path / made))
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_examples_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert {"own_loop", "trainer", "trl_sft"} <= {path.stem for path in files}
    assert all(len(path.read_text().splitlines()) < 60 for path in files)
