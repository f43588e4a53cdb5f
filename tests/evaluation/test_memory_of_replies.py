"""Evaluation where the memory is short, and without padding where options are rated."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gift.evaluation.choices
import gift.evaluation.generation
from gift.evaluation.choices import rate_options
from gift.evaluation.generation import generate_replies
from gift.evaluation.questions import Question
from gift.models.tokenizer import load_tokenizer

TEXTS = ["What is two?", "Add the numbers seven and eight; the sum is", "A train", "x + 4 = 9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"), "qwen2")


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)


def rated(folder: Path, batch_size: int) -> tuple[list[list[float]], list[int], int]:
    """Scores, how many questions each batch had, and the tokens that reached a linear layer."""
    model, tokenizer = load(folder)
    batches: list[int] = []
    reached = 0

    def count(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
        nonlocal reached
        reached += inputs[0].numel() // inputs[0].shape[-1]

    real = gift.evaluation.choices.enable_packing

    def watched(model: Any, examples: Any) -> bool:
        is_packed = real(model, examples)
        model.get_decoder().layers[0].mlp.up_proj.register_forward_hook(count)
        return is_packed

    questions = [Question("", [], "A", choices=["one", "two", "three"]) for _ in TEXTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gift.evaluation.choices, "enable_packing", watched)
        scores = rate_options(
            model,
            tokenizer,
            questions,
            TEXTS,
            batch_size=batch_size,
            done={},
            on_batch=lambda found: batches.append(len(found)),
        )
    return scores, batches, reached


def test_no_padded_token_reaches_a_layer_where_options_are_rated(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    together, batches, reached = rated(folder, 4)
    encoded: Any = tokenizer([f"{text}A" for text in TEXTS], add_special_tokens=False)
    assert batches == [4] and reached == sum(len(ids) - 1 for ids in encoded["input_ids"])
    alone, batches, _ = rated(folder, 1)
    assert batches == [1] * 4
    for found, expected in zip(together, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_options_are_rated_in_parts_where_the_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _, _ = rated(folder, 4)
    real = gift.evaluation.choices._score

    def limited(model: Any, batch: Any, packed: bool) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch, packed)

    monkeypatch.setattr(gift.evaluation.choices, "_score", limited)
    capsys.readouterr()
    found, batches, _ = rated(folder, 4)
    assert batches == [1] * 4
    for some, expected in zip(found, whole, strict=True):
        assert some == pytest.approx(expected, rel=1e-4)
    said = capsys.readouterr().err
    assert "note: at most 2 questions" in said and "note: at most 1 questions" in said


@pytest.mark.parametrize("room", [2, 0])
def test_replies_are_generated_in_parts_where_the_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    model, tokenizer = load(folder)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    options: dict[str, Any] = {
        **{"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 5},
        **{"seed": 1, "batch_size": 6},
    }
    whole = generate_replies(model, tokenizer, prompts, **options)
    real, sizes = gift.evaluation.generation._decode_batch, []

    def limited(model: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, prompts, *rest)

    monkeypatch.setattr(gift.evaluation.generation, "_decode_batch", limited)
    kept: list[Any] = []
    if room == 0:
        with pytest.raises(torch.OutOfMemoryError):
            generate_replies(model, tokenizer, prompts, **options)
        assert sizes == [6, 3, 1]
        return
    found = generate_replies(model, tokenizer, prompts, **options, on_batch=kept.extend)
    assert found == whole and len(kept) == 8
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1]
