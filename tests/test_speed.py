"""Useful operations agree with PyTorch's count; times are written and shown."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

import gift.models.loading
import gift.speed
import gift.storage.files
from gift.config import EvaluateConfig, RunConfig
from gift.evaluate import evaluate
from gift.run import run
from gift.speed import Clock, load_and_hash, useful_flops

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTH = 40


def counted(model: Any, backward: bool = False) -> int:
    ids = torch.arange(1, 1 + LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def attention(times: int = 1) -> int:
    """The half of the scores and their products with values that causal attention leaves out."""
    return times * 2 * 3 * 64 * LENGTH**2


def test_useful_work_is_what_pytorch_counts_without_what_the_mask_hides() -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), attn_implementation="eager")
    expected = counted(model) - attention()
    assert useful_flops(model, [LENGTH], LENGTH) == expected
    assert useful_flops(model, [LENGTH] * 2, 2 * LENGTH) == 2 * expected
    # No targets, no head; one row of twice the length has twice the attention.
    assert expected - useful_flops(model, [LENGTH], 0) == 2 * 200 * 64 * LENGTH
    assert useful_flops(model, [2 * LENGTH], 2 * LENGTH) == 2 * expected + 2 * attention()


def test_training_counts_the_gradients_of_inputs_and_adapters() -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    useful = useful_flops(model, [LENGTH], LENGTH, trains=True)
    # The first block's inputs need no gradients: of q, k and v, and of their adapters' A.
    first = 2 * LENGTH * 64 * (64 + 32 + 32 + 3 * 8)
    assert counted(adapted, backward=True) - attention(3) == useful - first


def test_experts_count_as_many_as_a_token_passes() -> None:
    small, large = (
        AutoModelForCausalLM.from_config(
            MixtralConfig(**SIZES, num_local_experts=experts, num_experts_per_tok=2)
        )
        for experts in (4, 8)
    )
    router = 2 * 3 * 4 * 64 * LENGTH
    assert useful_flops(large, [LENGTH], 0) == useful_flops(small, [LENGTH], 0) + router


def test_a_clock_adds_up_by_kind() -> None:
    clock = Clock()
    for kind in ("load", "compute", "load"):
        with clock(kind):
            pass
    assert list(clock.seconds) == ["load", "compute"] and min(clock.seconds.values()) >= 0


def test_a_run_loads_and_hashes_each_model_once_and_says_where_the_time_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("base", 1), ("instruct", 2)):
        tiny.make_model(tmp_path / name, "qwen2", seed=seed)
    tiny.write_rows(tmp_path / "rows.jsonl", 6)
    loads, hashes = [], []
    load, remember = gift.models.loading._load, gift.storage.files.remember_hash

    def count_load(folder: Path, **options: Any) -> Any:
        loads.extend([] if options.get("device_map") == "meta" else [folder.name])
        return load(folder, **options)

    def count_hash(path: Path, sha256: str) -> None:
        hashes.append(path)
        remember(path, sha256)

    monkeypatch.setattr(gift.models.loading, "_load", count_load)
    monkeypatch.setattr(gift.storage.files, "remember_hash", count_hash)
    monkeypatch.setattr(gift.storage.files, "REMEMBERED_BYTES", 0)
    models = {"base": str(tmp_path / "base"), "instruct": str(tmp_path / "instruct")}
    output = tmp_path / "out"
    run(RunConfig(**models, data=tmp_path / "rows.jsonl", output=output, lora_rank=2, device="cpu"))
    assert loads == ["instruct", "base"]
    for name in models:
        assert hashes.count(tmp_path / name / "model.safetensors") == 1
    printed = capsys.readouterr().out
    for stage, kinds in {
        "confidence": {"load", "hash", "compute", "wait", "save"},
        "adapter": {"load", "hash", "trial", "compute", "wait", "save"},
    }.items():
        assert json.loads((output / stage / "speed.json").read_text())["seconds"].keys() == kinds
    assert printed.count("Time") == 3 and "useful tflops" in printed
    step = json.loads((output / "adapter" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"tokens_per_second", "useful_tflops", "seconds"} <= step.keys()


def test_a_models_files_are_hashed_while_it_loads(tmp_path: Path) -> None:
    """Loading waits here for the hash, which would not begin before its end if one followed on."""
    folder = tiny.make_model(tmp_path / "model", "qwen2")
    hashed = threading.Event()
    found = gift.models.loading.model_hash(folder)

    def hash_model(path: Path) -> str:
        hashed.set()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gift.speed, "model_hash", hash_model)
        clock = Clock()
        assert load_and_hash(folder, clock, lambda: hashed.wait(60)) == (True, found)
    assert clock.seconds.keys() == {"load", "hash"}


def test_the_shards_of_a_model_are_hashed_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_model(tmp_path / "model", "qwen2")
    both = threading.Barrier(2, timeout=60)
    real = gift.models.loading.hash_file
    alone = gift.models.loading.model_hash(folder)

    def wait(path: Path) -> str:
        both.wait()
        return real(path)

    monkeypatch.setattr(gift.models.loading, "hash_file", wait)
    assert gift.models.loading.model_hash(folder) == alone


def test_an_evaluation_says_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tiny.make_model(tmp_path / "model", "qwen2"), tmp_path / "out"
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "2 + 3?", "answer": "5"}) + "\n")
    options = {"check": "exact", "samples": 1, "max_new_tokens": 3, "device": "cpu"}
    data = tmp_path / "asked.jsonl"
    evaluate(EvaluateConfig(model=str(folder), data=data, output=output, **options))
    seconds = json.loads((output / "speed.json").read_text())["seconds"]
    assert seconds.keys() == {"load", "hash", "compute", "check"}
    assert "Time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3090", 71),
        ("Another", None),
    ],
)
def test_a_devices_peak_follows_from_its_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert gift.speed._peak(torch.device("cuda")) == peak
