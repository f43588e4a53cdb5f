"""What `gift diff` reports of changes that are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import factors, llama, run_merge, save_adapter, save_model, save_pair, tensors

from gift.config import DiffConfig
from gift.errors import InputError
from gift.merge.diff import diff

MODULE = "model.layers.0.mlp.down_proj"


def compare(folder: Path, **options: Any) -> dict[str, Any]:
    """Report of folder/merged against folder/model, its tensors by name."""
    defaults = {"model_a": str(folder / "model"), "model_b": str(folder / "merged")}
    report = diff(DiffConfig(**{**defaults, **options}))
    return report | {"tensors": {entry["name"]: entry for entry in report["tensors"]}}


def test_size_and_rank_of_an_adapters_change(tmp_path: Path) -> None:
    save_pair(tmp_path)
    run_merge(tmp_path)
    report = compare(tmp_path)
    a, b = factors(tmp_path / "adapter", MODULE)
    delta = 6 / 4 * b @ a
    weight = tensors(tmp_path / "model")[f"{MODULE}.weight"].double()
    found = report["tensors"][f"{MODULE}.weight"]
    assert found["relative_change"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    share = torch.linalg.svdvals(delta)[:4]
    share = share / share.sum()
    rank = float(torch.exp(-(share * share.log()).sum()))
    assert found["effective_rank"] == pytest.approx(rank, rel=1e-2)
    unchanged = report["tensors"]["model.norm.weight"]
    assert unchanged["relative_change"] == 0
    assert report["changed_tensors"] == 14


def test_share_of_a_change_that_bf16_cannot_hold(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16)
    run_merge(tmp_path)
    report = compare(tmp_path, adapter=str(tmp_path / "adapter"))
    a, b = factors(tmp_path / "adapter", MODULE)
    delta = 6 / 4 * b @ a
    weight = tensors(tmp_path / "model")[f"{MODULE}.weight"].double()
    held = (weight + delta).to(torch.bfloat16).double() - weight
    loss = float((delta - held).norm() / delta.norm())
    assert loss > 1e-3
    found = report["tensors"][f"{MODULE}.weight"]["rounding_loss"]
    assert found == pytest.approx(loss, rel=2e-2)


def test_a_report_and_a_figure_are_written(tmp_path: Path) -> None:
    save_pair(tmp_path)
    run_merge(tmp_path)
    report = compare(tmp_path, output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "diff.json").read_text())
    assert len(written["tensors"]) == len(report["tensors"])
    assert (tmp_path / "out" / "diff.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_different_shapes_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_model(tmp_path / "merged", llama(intermediate_size=40))
    with pytest.raises(InputError, match=r"cannot be compared:\n- .*down_proj.*\[32, 48\]"):
        compare(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_pair(tmp_path)
    run_merge(tmp_path)
    save_model(tmp_path / "other", llama(hidden_size=64))
    save_adapter(tmp_path / "wrong", tmp_path / "other")
    with pytest.raises(InputError, match="--adapter"):
        compare(tmp_path, adapter=str(tmp_path / "wrong"))
