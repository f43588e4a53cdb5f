"""Undoing a merge: bitwise with the residual, to one rounding without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import (
    SETTINGS,
    llama,
    merge_two,
    run_merge,
    save_adapter,
    save_model,
    save_pair,
    save_three,
    tensors,
)
from safetensors.torch import load_file, save_file

from gift.config import MergeOptions, UnmergeConfig
from gift.errors import InputError
from gift.merge.methods import METHODS
from gift.merge.residual import decode_block, encode_block
from gift.merge.unmerge import unmerge
from gift.storage.publish import LIST_FILE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["lora", "dare"])
def test_the_residual_brings_every_bit_back(
    dtype: torch.dtype, method: str, tmp_path: Path
) -> None:
    save_pair(tmp_path, dtype=dtype, shard_size="20KB")
    merged = run_merge(tmp_path, method=method, save_residual=True)
    summary = unmerge(UnmergeConfig(model=str(merged), output=tmp_path / "back"))
    assert summary["precision"].startswith("exact")
    before, changed, after = (tensors(tmp_path / n) for n in ("model", "merged", "back"))
    assert any(not torch.equal(before[name], changed[name]) for name in before)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_untied_head_is_tied_again_by_the_residual(tmp_path: Path) -> None:
    save_model(tmp_path / "model", llama(tie_word_embeddings=True))
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["lm_head"])
    merged = run_merge(tmp_path, untie_embeddings=True, save_residual=True)
    unmerge(UnmergeConfig(model=str(merged), output=tmp_path / "back"))
    before, after = tensors(tmp_path / "model"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = (tmp_path / "model" / "config.json").read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == config


def test_without_the_residual_weights_come_back_to_one_rounding(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16)
    merged = run_merge(tmp_path, scale=["0.7"])
    options: dict[str, Any] = {"model": str(merged), "output": tmp_path / "back"}
    with pytest.raises(InputError, match="the merged adapters are needed, in order: adapter"):
        unmerge(UnmergeConfig(**options))
    summary = unmerge(UnmergeConfig(**options, adapter=[str(tmp_path / "adapter")]))
    assert "one rounding" in summary["precision"]
    before, changed, after = (tensors(tmp_path / n) for n in ("model", "merged", "back"))
    for name, weight in before.items():
        half_ulps = 2.0**-8 * (changed[name].float().abs() + weight.float().abs())
        error = (after[name].float() - weight.float()).abs()
        assert (error <= 1.01 * half_ulps).all()


def test_a_merge_that_is_no_sum_is_not_subtracted(tmp_path: Path) -> None:
    save_pair(tmp_path)
    merged = run_merge(tmp_path, method="ties")
    config = UnmergeConfig(
        model=str(merged), adapter=[str(tmp_path / "adapter")], output=tmp_path / "back"
    )
    with pytest.raises(InputError, match="no plain sum"):
        unmerge(config)
    with pytest.raises(InputError, match="gift merge did not write it"):
        unmerge(UnmergeConfig(model=str(tmp_path / "model"), output=tmp_path / "back"))


def test_a_method_that_is_a_plain_sum_with_its_settings_is_taken_back(tmp_path: Path) -> None:
    save_pair(tmp_path)
    save_model(tmp_path / "base", seed=3)
    options: dict[str, Any] = {"base": str(tmp_path / "base"), "method": "re-adapt"}
    adapter = [str(tmp_path / "adapter")]
    merged = run_merge(tmp_path, task_weight=0.5, **options)
    unmerge(UnmergeConfig(model=str(merged), adapter=adapter, output=tmp_path / "back"))
    for name, tensor in tensors(tmp_path / "model").items():
        torch.testing.assert_close(tensors(tmp_path / "back")[name], tensor, rtol=0, atol=1e-6)
    run_merge(tmp_path, instruct_weight=0.5, overwrite=True, **options)
    with pytest.raises(InputError, match="re-adapt.*no plain sum"):
        unmerge(UnmergeConfig(model=str(merged), adapter=adapter, output=tmp_path / "again"))


@pytest.mark.parametrize(
    ("method", "has_base"),
    [
        (name, has_base)
        for name in METHODS
        for has_base in (False, True)
        if not METHODS[name].statistics and (has_base or not METHODS[name].needs_base)
    ],
)
def test_what_a_method_calls_a_plain_sum_is_taken_back(
    method: str, has_base: bool, tmp_path: Path
) -> None:
    save_three(tmp_path)
    merged = merge_two(tmp_path, method, has_base)
    options = MergeOptions(**{k: v for k, v in SETTINGS.items() if k in METHODS[method].settings})
    adapters = [str(tmp_path / f"adapter{number}") for number in (1, 2)]
    config = UnmergeConfig(model=str(merged), adapter=adapters, output=tmp_path / "back")
    if METHODS[method].sum_weight(options, len(adapters), has_base) is None:
        with pytest.raises(InputError, match="no plain sum"):
            unmerge(config)
        return
    unmerge(config)
    for name, tensor in tensors(tmp_path / "model").items():
        torch.testing.assert_close(tensors(tmp_path / "back")[name], tensor, rtol=0, atol=1e-12)


def test_a_residual_of_other_weights_is_refused(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16)
    merged = run_merge(tmp_path, save_residual=True)
    path = merged / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="model.safetensors: is not what was written"):
        unmerge(UnmergeConfig(model=str(merged), output=tmp_path / "back"))
    (merged / LIST_FILE).unlink()
    with pytest.raises(InputError, match="does not fit the merged weights"):
        unmerge(UnmergeConfig(model=str(merged), output=tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_residual_blocks_hold_any_bits(dtype: torch.dtype) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([limits.min, limits.max, -1, 0, 1], dtype=integers)
    noise = torch.randint(-(2**15), 2**15, (40,), generator=generator).to(integers)
    values = torch.cat([edges, noise])
    original = values.repeat(len(values)).view(dtype)
    merged = values.repeat_interleave(len(values)).view(dtype)
    back = decode_block(merged, encode_block(original, merged))
    assert torch.equal(back.view(integers), original.view(integers))
