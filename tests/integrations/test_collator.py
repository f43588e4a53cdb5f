"""Weights follow their tokens through every collator that pads or packs; others are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from gift.errors import InputError
from gift.integrations import WeightedCollator

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "token_weight": [0.0, 0.5, 0.25]},
    {"input_ids": [8, 9], "labels": [-100, 9], "token_weight": [0.0, 1.0]},
]


def rows() -> list[dict[str, Any]]:
    return [{key: [*values] for key, values in row.items()} for row in ROWS]


def padder(side: str) -> DataCollatorForSeq2Seq:
    tokenizer = tiny.make_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)


@pytest.mark.parametrize(
    ("collator", "expected"),
    [
        (padder("right"), [[0, 0.5, 0.25], [0, 1, 0]]),
        (padder("left"), [[0, 0.5, 0.25], [0, 0, 1]]),
        (DataCollatorWithFlattening(), [[0, 0.5, 0.25, 0, 1]]),
        (TRLCollator(0), [[0, 0.5, 0.25], [0, 1, 0]]),
        (TRLCollator(0, pad_to_multiple_of=4), [[0, 0.5, 0.25, 0], [0, 1, 0, 0]]),
        (TRLCollator(0, padding_free=True), [[0, 0.5, 0.25, 0, 1]]),
    ],
    ids=["right", "left", "packed", "trl", "trl-multiple", "trl-packed"],
)
def test_each_weight_stands_at_its_label(collator: Any, expected: list[list[float]]) -> None:
    batch = WeightedCollator(collator)(rows())
    assert batch["token_weight"].tolist() == expected
    assert batch["token_weight"].dtype == torch.float32
    assert batch["token_weight"].shape == batch["labels"].shape
    assert "token_weight" not in collator(
        [{k: v for k, v in row.items() if k != "token_weight"} for row in rows()]
    )


def test_rows_without_weights_pass() -> None:
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows()]
    assert "token_weight" not in WeightedCollator(padder("right"))(plain)


def with_other_tokens(features: list[dict[str, Any]]) -> Any:
    """As a collator that masks tokens for a denoising loss."""
    batch = DataCollatorWithFlattening()(features)
    batch["input_ids"][0, 1] = 99
    return batch


def with_other_labels(features: list[dict[str, Any]]) -> Any:
    batch = padder("right")(features)
    batch["labels"] = batch["labels"].roll(1, 1)
    return batch


def with_a_row_less(features: list[dict[str, Any]]) -> Any:
    return padder("right")(features[:1])


@pytest.mark.parametrize("collator", [with_other_tokens, with_other_labels, with_a_row_less])
def test_a_collator_that_changes_rows_is_refused(collator: Any) -> None:
    with pytest.raises(InputError, match="^data_collator: function changes the tokens"):
        WeightedCollator(collator)(rows())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_weight": [0.5]}, "a row has 3 input_ids, 3 labels and 1 token_weight"),
        ({"labels": None}, "a row has no labels"),
        ({"token_weight": None}, "a row has no token_weight"),
    ],
)
def test_rows_whose_columns_do_not_fit_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        WeightedCollator(padder("right"))([{**ROWS[0], **changes}, ROWS[1]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    row = {**ROWS[0], "token_weight": [0.0, 0.5, value]}
    with pytest.raises(
        InputError, match=f"token_weight: the weight at place 2 of a row is {value}"
    ):
        WeightedCollator(padder("right"))([row, ROWS[1]])


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    collator = WeightedCollator(padder("right"), vocab_size=9)
    with pytest.raises(InputError, match="input_ids: a row has token 9, the model 9 tokens"):
        collator(rows())
