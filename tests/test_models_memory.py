"""What models keep in memory beside their weights."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import gift.train
from gift.config import TrainConfig
from gift.models.head import CHECKED_TOKENS, check_head
from gift.models.loading import load_causal_lm
from gift.train import train


def test_a_trained_model_is_gone_when_the_next_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = tiny.make_model(tmp_path / "model", "qwen2"), tmp_path / "rows.jsonl"
    trained: list[Any] = []
    load = gift.train.load_causal_lm

    def watched(*given: Any) -> Any:
        model = load(*given)
        trained.append(weakref.ref(model))
        return model

    monkeypatch.setattr(gift.train, "load_causal_lm", watched)
    options = {"model": str(folder), "tokenizer": str(folder), "weighting": "uniform"}
    gc.disable()
    try:
        output = tmp_path / "adapter"
        train(TrainConfig(data=tiny.write_rows(rows, 2), output=output, lora_rank=2, **options))
        assert trained[0]() is not None, "nothing keeps it: no need to collect"
        load_causal_lm(folder, torch.float32, torch.device("cpu"))
        assert trained[0]() is None
    finally:
        gc.enable()


def test_the_check_of_a_head_holds_few_logits(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", "qwen2", max_position_embeddings=2000)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    shapes: list[Any] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, logits: shapes.append(logits.shape)
    )
    check_head(model, torch.arange(1500) % 300)
    assert [shape[1] for shape in shapes] == [CHECKED_TOKENS]
