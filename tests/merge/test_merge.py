"""The merge's precision, the folder it writes, and what it refuses."""

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merge_models import (
    factors,
    llama,
    load,
    logits,
    round_once,
    run_merge,
    save_adapter,
    save_model,
    save_pair,
    tensors,
    ulps_apart,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gift.merge.command as merge_module
import gift.merge.stream as apply_module
from gift.errors import InputError
from gift.merge.rounding import merge_to_one_ulp
from gift.storage.shards import ShardWriter, open_checkpoint


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi-head-bias"])
def test_merged_model_computes_what_the_adapted_model_computes(
    architecture: str, tmp_path: Path
) -> None:
    tiny.make_model(tmp_path / "model", architecture)
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "model")
    merged = load(run_merge(tmp_path))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=2e-5, atol=2e-5)


def test_bf16_merge_is_the_exact_result_rounded_once(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """At most 1 of 10,000 elements differs from float64 rounded once, by one ulp; PEFT beside."""
    config = llama(hidden_size=256, intermediate_size=640, num_hidden_layers=2)
    save_model(tmp_path / "model", config, dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", tmp_path / "model", r=64, lora_alpha=128)
    ours = tensors(run_merge(tmp_path))
    weights = tensors(tmp_path / "model")
    results = {"gift merge": ours}
    for safe in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        label = "PEFT safe_merge" if safe else "PEFT merge_and_unload"
        results[label] = adapted.merge_and_unload(safe_merge=safe).state_dict()  # pyright: ignore
    counts = {label: [0, 0, 0] for label in results}
    for name, weight in weights.items():
        if "proj" not in name:
            continue
        a, b = factors(tmp_path / "adapter", name.removesuffix(".weight"))
        truth = round_once(weight.double() + 2.0 * (b @ a), torch.bfloat16)
        for label, result in results.items():
            apart = ulps_apart(result[name], truth)
            wrong, worst, total = counts[label]
            counts[label] = [
                wrong + int((apart > 0).sum()),
                max(worst, int(apart.max())),
                total + apart.numel(),
            ]
    for label, (wrong, worst, total) in counts.items():
        record_property(label, f"{1e4 * wrong / total:.2f} of 10,000, worst {worst} ulp")
        print(f"{label}: {1e4 * wrong / total:.2f} of 10,000 off, worst {worst} ulp, n {total}")
    wrong, worst, total = counts["gift merge"]
    assert total > 1_000_000
    assert wrong <= total / 10_000
    assert worst <= 1
    assert counts["PEFT safe_merge"][0] > 100 * wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("deviation", [0.02, 0.0], ids=["cancelling", "zero weights"])
def test_no_element_is_off_by_more_than_one_ulp_where_terms_cancel(
    dtype: torch.dtype, deviation: float
) -> None:
    """Float32 alone is off by hundreds of ulps there: the sum's last place is far below 2^-24."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(512, 64, generator=generator), torch.randn(64, 512, generator=generator)
    weight = (deviation * torch.randn(512, 512, generator=generator)).to(dtype)
    # Rows in which W is all but −B A, as after subtracting an adapter that was merged before.
    weight[:256] = deviation * 50 * (-0.1 * (b @ a)[:256]).to(dtype)
    found = merge_to_one_ulp(weight, [a], [b], [0.1 * (deviation * 50 or 1)], dtype)
    truth = weight.double() + 0.1 * (deviation * 50 or 1) * (b.double() @ a.double())
    assert ulps_apart(found, round_once(truth, dtype)).max() <= 1


def test_several_adapters_are_added_with_their_coefficients_and_one_rounding(
    tmp_path: Path,
) -> None:
    save_model(tmp_path / "model", dtype=torch.bfloat16)
    for number in (1, 2):
        options: dict[str, Any] = {"r": 3 * number, "seed": number}
        save_adapter(tmp_path / f"adapter{number}", tmp_path / "model", **options)
    paths = [str(tmp_path / f"adapter{number}") for number in (1, 2)]
    found = tensors(run_merge(tmp_path, adapter=paths, scale=["0.5", "-1.5"]))
    for name, weight in tensors(tmp_path / "model").items():
        truth = weight.double()
        if "proj" in name:
            for number, coefficient in ((1, 0.5), (2, -1.5)):
                a, b = factors(tmp_path / f"adapter{number}", name.removesuffix(".weight"))
                truth = truth + coefficient * 6 / (3 * number) * (b @ a)
        apart = ulps_apart(found[name], round_once(truth, torch.bfloat16))
        assert apart.max() <= 1
        assert (apart > 0).float().mean() <= 1e-3


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.bfloat16, "float16")],
)
def test_converted_weights_are_rounded_once_and_declared(
    stored: torch.dtype, chosen: str, tmp_path: Path
) -> None:
    save_pair(tmp_path, dtype=stored, shard_size="20KB")
    merged = run_merge(tmp_path, dtype=chosen)
    dtype = getattr(torch, chosen)
    found = tensors(merged)
    for name, weight in tensors(tmp_path / "model").items():
        truth = weight.double()
        if "proj" in name:
            a, b = factors(tmp_path / "adapter", name.removesuffix(".weight"))
            truth = truth + 1.5 * (b @ a)
        assert found[name].dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(found[name].double(), truth, rtol=1e-6, atol=1e-7)
        else:
            assert ulps_apart(found[name], round_once(truth, dtype)).max() <= 1
    assert json.loads((merged / "config.json").read_text())["dtype"] == chosen
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_the_block_size_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pair(tmp_path, dtype=torch.float64)
    whole = tensors(run_merge(tmp_path))
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 700)
    blocks = tensors(run_merge(tmp_path, output=tmp_path / "blocks"))
    for name, tensor in whole.items():
        torch.testing.assert_close(blocks[name], tensor, rtol=1e-14, atol=1e-14)


def test_everything_that_is_not_weights_comes_along(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    model = tmp_path / "model"
    (model / "LICENSE").write_text("terms")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"w")
    (model / "original" / "params.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"w")
    (model / ".cache").mkdir()
    training = {"kind": "gift adapter", "data_hash": "d1", "confidence_hash": "c1"}
    (tmp_path / "adapter" / "gift_train.json").write_text(json.dumps(training))
    merged = run_merge(tmp_path)
    kept = {"LICENSE", "config.json", "generation_config.json", "chat_template.jinja"}
    kept |= {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"}
    for name in kept:
        assert (merged / name).read_bytes() == (model / name).read_bytes(), name
    for name in ("original", "pytorch_model.bin", ".cache"):
        assert not (merged / name).exists()
    templates = {"default": tiny.CHATML, "tools": "{{ x }}"}
    assert AutoTokenizer.from_pretrained(merged).chat_template == templates
    manifest = json.loads((merged / "gift_merge.json").read_text())
    assert any("original, pytorch_model.bin" in note for note in manifest["notes"])
    assert manifest["adapters"][0]["training"]["data_hash"] == "d1"
    hashes = manifest["shards"]["model.safetensors"]["sha256"]
    assert hashes.keys() == tensors(merged).keys()
    card = (merged / "README.md").read_text()
    for part in ("data hash | `d1`", "confidence hash | `c1`", "rank 4, alpha 6", "`lora`"):
        assert part in card


def test_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path)
    run_merge(tmp_path, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
    shown = capsys.readouterr().out
    assert "q_proj" in shown and "32x32" in shown and "1.5" in shown


def test_an_existing_output_is_refused_without_overwrite(tmp_path: Path) -> None:
    save_pair(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        run_merge(tmp_path)
    assert (tmp_path / "merged" / "mine.txt").exists()
    run_merge(tmp_path, overwrite=True)
    assert not (tmp_path / "merged" / "mine.txt").exists()
    assert not list(tmp_path.glob("merged?*"))


def test_an_adapter_trained_on_another_model_is_noted(tmp_path: Path) -> None:
    save_model(tmp_path / "base", seed=3)
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    manifest = json.loads((run_merge(tmp_path) / "gift_merge.json").read_text())
    assert any(f"was trained on {tmp_path / 'base'}" in note for note in manifest["notes"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def lose_tensor(path: Path) -> None:
    weights = load_file(path)
    weights.pop(next(iter(weights)))
    save_file(weights, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda first: first.unlink(), "no such file; download"),
        (cut, r"the header describes \d+ bytes"),
        (lose_tensor, "not in their shards: "),
        (lambda first: first.write_bytes(struct.pack("<Q", 3) + b"{{{"), "broken safetensors"),
        (lambda first: first.write_bytes(b"version https://git-lfs"), "not a safetensors file"),
    ],
    ids=["missing shard", "cut shard", "lost tensor", "broken header", "pointer file"],
)
def test_a_broken_model_folder_is_named_before_any_output(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_pair(tmp_path, shard_size="20KB")
    spoil(sorted((tmp_path / "model").glob("*.safetensors"))[0])
    with pytest.raises(InputError, match=message):
        run_merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))


def test_a_model_with_pickled_weights_only_is_one_clear_error(tmp_path: Path) -> None:
    save_pair(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights .*save_pretrained it once"):
        run_merge(tmp_path)


def test_an_adapter_as_the_model_is_an_error(tmp_path: Path) -> None:
    save_pair(tmp_path)
    with pytest.raises(InputError, match="is an adapter, not a model"):
        open_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": ["1", "2"]}, "--scale: 2 values for 1 adapters"),
        ({"scale": ["big"]}, "--scale: could not convert"),
        ({"scale": ["nan"]}, "--scale: nan: expected finite numbers"),
        ({"method": "re-adapt"}, "--base: --method re-adapt needs the base model"),
        ({"method": "fisher"}, "--statistics: --method fisher needs 2 folders"),
        ({"statistics": ["x"]}, "--statistics: --method lora uses none"),
        ({"save_residual": True, "dtype": "float16"}, "--save-residual: needs --dtype keep"),
        ({"task_weight": 0.5}, "--task-weight: --method lora does not read it"),
        ({"device": "warp"}, "--device: 'warp' is no device"),
        ({"device": "meta"}, "--device: meta cannot be used here"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_pair(tmp_path)
    with pytest.raises(InputError, match=message):
        run_merge(tmp_path, **options)
    assert not list(tmp_path.glob("merged*"))


def test_a_base_model_of_another_shape_is_an_error(tmp_path: Path) -> None:
    save_pair(tmp_path)
    save_model(tmp_path / "base", llama(vocab_size=80))
    with pytest.raises(InputError, match=r"\[96, 32\] in --model, \[80, 32\] in --base"):
        run_merge(tmp_path, method="re-adapt", base=str(tmp_path / "base"))


def test_too_little_disk_is_seen_before_any_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="0.0 GB free, the merged model needs"):
        run_merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))


def test_a_disk_that_fills_up_is_one_line_and_the_merge_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path, shard_size="20KB")
    write, calls = ShardWriter.write, []

    def fill(self: ShardWriter, block: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, block)

    monkeypatch.setattr(ShardWriter, "write", fill)
    with pytest.raises(OSError, match=r"the disk is full.*merged.partial"):
        run_merge(tmp_path)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.partial" / "config.json").exists()
    monkeypatch.undo()
    run_merge(tmp_path)
    whole = run_merge(tmp_path, output=tmp_path / "whole")
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()


def test_a_disk_that_returns_other_bytes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)
    write = ShardWriter._write_raw

    def flip(self: ShardWriter, data: Any) -> None:
        """Writes what it was given but for one bit of the fourth piece."""
        self.pieces = getattr(self, "pieces", 0) + 1  # pyright: ignore
        if self.pieces == 4:  # pyright: ignore
            data = bytes([data[0] ^ 1]) + bytes(data[1:])
        write(self, data)

    monkeypatch.setattr(ShardWriter, "_write_raw", flip)
    with pytest.raises(OSError, match="differs from what was written"):
        run_merge(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_note_says_where_it_is_unknown_whether_the_model_is_whole(tmp_path: Path) -> None:
    save_pair(tmp_path)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "of tomorrow"}))
    notes = json.loads((run_merge(tmp_path) / "gift_merge.json").read_text())["notes"]
    assert any("is whole was not checked" in note for note in notes), notes
