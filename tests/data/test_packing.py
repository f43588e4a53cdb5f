"""Packed rows give the same as single rows, without padding; what cannot be packed gets a note."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gift.annotate
import gift.data.packing
import gift.train
from gift.annotate import annotate
from gift.config import AnnotateConfig, TrainConfig
from gift.data.batches import make_batch
from gift.data.encoding import Example
from gift.data.packing import NAME, enable_packing, packed_attention
from gift.models.head import last_hidden_state
from gift.train import train

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral, window": (MistralConfig, {"sliding_window": 8}),
    "gemma 3, windows": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 8}),
    "phi 3": (Phi3Config, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
}


def make_model(config: type, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**{**SIZES, **options})).eval()


def make_rows(lengths: tuple[int, ...] = (5, 17, 3, 30)) -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        Example(row, generator.integers(1, 300, n).astype(np.int32), np.arange(n) >= 1)
        for row, n in enumerate(lengths)
    ]


@torch.no_grad()
def hidden_states(model: Any, rows: list[Example], packed: bool) -> Tensor:
    """The hidden states that predict the targets, row after row."""
    batch = make_batch(rows, packed=packed)
    return last_hidden_state(model, **batch.inputs).flatten(0, 1)[batch.predicts]


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_give_what_they_give_alone(architecture: str) -> None:
    config, options = PACKED[architecture]
    model, rows = make_model(config, **options), make_rows()
    alone = torch.cat([hidden_states(model, [row], packed=False) for row in rows])
    assert enable_packing(model, rows)
    together = hidden_states(model, rows, packed=True)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # Rows in another order and company give the same.
    backwards = hidden_states(model, rows[::-1], packed=True)
    sizes = [row.targets for row in rows]
    torch.testing.assert_close(
        torch.cat(backwards.split(sizes[::-1])[::-1]), alone, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (Gemma2Config, {"head_dim": 16}, "its attention soft-caps scores"),
        # Transformers 5.0 does not name its layers, and the comparison at the start finds them.
        (FalconMambaConfig, {}, "it has layers of type linear_attention|states of two rows change"),
        (BloomConfig, {}, "its attention cannot be replaced"),
    ],
    ids=["gemma2", "mamba", "bloom"],
)
def test_what_cannot_be_packed_is_padded_with_one_note(
    config: type, options: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = make_model(config, **options), make_rows()
    before = model.config._attn_implementation
    assert not enable_packing(model, rows)
    assert model.config._attn_implementation == before
    notes = capsys.readouterr().err
    assert notes.count("note:") == 1 and "rows are padded, not packed" in notes
    assert re.search(reason, notes)
    alone = torch.cat([hidden_states(model, [row], packed=False) for row in rows])
    padded = hidden_states(model, rows, packed=False)
    torch.testing.assert_close(padded, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fault", ["rows see each other", "no window", "nan"])
def test_attention_that_mixes_rows_or_forgets_windows_is_not_trusted(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(*tensors: Any, **options: Any) -> Any:
        if fault == "rows see each other":
            options["row_lengths"] = (sum(options["row_lengths"]),)
        if fault == "no window":
            options["sliding_window"] = None
        attended, _ = packed_attention(*tensors, **options)
        return attended * (float("nan") if fault == "nan" else 1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, faulty)
    assert not enable_packing(make_model(MistralConfig, sliding_window=8), make_rows())
    assert "the hidden states of two rows change by" in capsys.readouterr().err


def test_no_padded_token_reaches_a_linear_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Annotation and training of rows of very different lengths, without the checks before them."""
    for name, seed in (("instruct", 1), ("base", 2)):
        tiny.make_model(tmp_path / name, "qwen2", seed=seed)
    data = tiny.write_rows(tmp_path / "rows.jsonl")
    tokens: list[int] = []

    def watched(model: Any, examples: Any) -> bool:
        is_packed = enable_packing(model, examples)
        tokens.append(sum(len(example.input_ids) for example in examples))
        for module in model.get_decoder().modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(count)
        return is_packed

    def count(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        seen[module] = seen.get(module, 0) + inputs[0].numel() // inputs[0].shape[-1]

    for stage in (gift.annotate, gift.train):
        monkeypatch.setattr(stage, "enable_packing", watched)
    seen: dict[nn.Module, int] = {}
    store = tmp_path / "confidence"
    annotate(AnnotateConfig(model=str(tmp_path / "instruct"), data=data, output=store))
    assert len(seen) == 14 and set(seen.values()) == {tokens[0]}
    seen.clear()
    train(
        TrainConfig(
            model=str(tmp_path / "base"),
            data=data,
            confidence=store,
            output=tmp_path / "adapter",
            micro_batch_tokens=100,
            lora_rank=2,
            gradient_checkpointing="off",
        )
    )
    assert len(seen) == 14 and set(seen.values()) == {tokens[1]}


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("has_groups", [True, False], ids=["2.12", "2.11"])
def test_the_fused_kernel_is_called_for_the_same_attention(
    window: int | None, has_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what PyTorch documents of `varlen_attn`, in float32, in place of the kernel."""

    def documented(
        query: Tensor, key: Tensor, value: Tensor, borders: Tensor, *_: Any, **options: Any
    ) -> Tensor:
        left, right = options["window_size"]
        assert right == 0 and options.get("enable_gqa", False) is has_groups
        rows = []
        for first, last in itertools.pairwise(borders.tolist()):
            q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
            place = torch.arange(last - first)
            distance = place[:, None] - place
            mask = (distance >= 0) & ((distance <= left) | (left < 0))
            attended = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=options["scale"], enable_gqa=has_groups
            )
            rows.append(attended[0].transpose(0, 1))
        return torch.cat(rows)

    monkeypatch.setattr(gift.data.packing, "varlen_attn", documented)
    names = {"window_size", "enable_gqa"} if has_groups else {"window_size"}
    monkeypatch.setattr(gift.data.packing, "_VARLEN_OPTIONS", names)
    lengths = (5, 17, 3, 30)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window}
    packing = {"row_lengths": lengths, "cu_seq_lens_q": borders, "max_length_q": 30}
    expected, _ = packed_attention(nn.Module(), query, key, value, None, **packing, **options)
    found = gift.data.packing._fused(query, key, value, borders, 30, 0.3, window)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_in_one_kernel_give_what_they_give_alone(architecture: str) -> None:
    config, options = PACKED[architecture]
    rows = make_rows((5, 170, 3, 300))
    model = make_model(config, **{"max_position_embeddings": 512, **options})
    expected = torch.cat([hidden_states(model, [row], packed=False) for row in rows])
    model = model.to("cuda", torch.bfloat16)
    assert enable_packing(model, rows)
    batch = make_batch(rows, packed=True).to(torch.device("cuda"))
    hidden = last_hidden_state(model, **batch.inputs)[0]
    hidden.float().square().mean().backward()
    found = hidden[batch.predicts].float().cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert all(
        p.grad.isfinite().all() for p in model.get_decoder().parameters() if p.grad is not None
    )


def test_where_flash_attention_fails_ours_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gift.data.packing, "_attentions", lambda: ["flash_attention_2", NAME])
    model, rows = make_model(LlamaConfig), make_rows()
    assert enable_packing(model, rows) and model.config._attn_implementation == NAME


def test_packing_imports_without_varlen_attn() -> None:
    code = (
        "import sys; sys.modules['torch.nn.attention.varlen'] = None;"
        "import gift.data.packing as p;"
        "assert p.varlen_attn is None and not p._VARLEN_OPTIONS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
