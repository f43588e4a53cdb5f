"""Wraps a collator so that the weights of tokens follow the tokens into the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gift.errors import InputError

TOKEN_WEIGHT = "token_weight"


class WeightedCollator:
    """Any collator that pads or packs rows, with a column `token_weight` that follows the tokens.

    `DataCollatorForSeq2Seq` of Transformers pads, `DataCollatorWithFlattening` packs. A row has
    `input_ids`, `labels` and `token_weight`, all of one length: `token_weight[i]` is the weight of
    `labels[i]`, the token at position i. The batch gets `token_weight` float32 of the shape of its
    `labels`, 0 where there is padding. Rows without the column are collated as usual.

    Args:
        collator: makes a batch of rows without weights.
        vocab_size: size of the model's vocabulary; all ids must be below it.

    InputError: a row whose three columns differ in length or of which one is missing, a weight that
    is infinite or NaN, a token that the model does not have; or a collator that does more than pad,
    pack and mask labels, so that weights would not match tokens.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], Any], vocab_size: int | None = None
    ) -> None:
        self.collator = collator
        self.vocab_size = vocab_size

    def __call__(self, features: Sequence[dict[str, Any]]) -> Any:
        """The batch of some rows."""
        if not any(TOKEN_WEIGHT in row for row in features):
            return self.collator(list(features))
        for row in features:
            require_aligned(row)
        weights = [torch.as_tensor(row[TOKEN_WEIGHT], dtype=torch.float32) for row in features]
        rows = [{k: v for k, v in row.items() if k != TOKEN_WEIGHT} for row in features]
        # Collators change rows in place.
        tokens = [torch.as_tensor([row["input_ids"], row["labels"]]) for row in rows]
        self._check(tokens, weights)
        batch = self.collator(rows)
        made = torch.stack([torch.as_tensor(batch[key]) for key in ("input_ids", "labels")])
        place = _find_places(tokens, made)
        if place is None:
            raise InputError(
                f"data_collator: {type(self.collator).__name__} changes the tokens or labels of "
                f"rows, so that their {TOKEN_WEIGHT} would belong to others; use a collator that "
                "pads or packs, such as DataCollatorForSeq2Seq or DataCollatorWithFlattening"
            )
        placed = torch.zeros(made.shape[1:])
        for (row, start), weight in zip(place, weights, strict=True):
            placed[row, start : start + len(weight)] = weight
        batch[TOKEN_WEIGHT] = placed
        return batch

    def _check(self, tokens: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        for row in weights:
            if not bool(row.isfinite().all()):
                place = int(row.isfinite().logical_not().nonzero()[0])
                raise InputError(
                    f"{TOKEN_WEIGHT}: the weight at place {place} of a row is {float(row[place])}; "
                    "weights must be finite"
                )
        largest = max((int(row[0].max()) for row in tokens if row.numel()), default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise InputError(
                f"input_ids: a row has token {largest}, the model {self.vocab_size} tokens; use a "
                "model with the vocabulary of the tokenizer that made the rows"
            )


def require_aligned(row: dict[str, Any], name: str = "a row") -> None:
    """InputError unless the row has tokens, labels and weights, as many of each."""
    missing = [key for key in ("input_ids", "labels", TOKEN_WEIGHT) if row.get(key) is None]
    if missing:
        raise InputError(
            f"{name} has no {' and no '.join(missing)}: weights need tokens and labels made with "
            "them; see gift.datasets.with_confidence"
        )
    lengths = [len(row[key]) for key in ("input_ids", "labels", TOKEN_WEIGHT)]
    if len(set(lengths)) > 1:
        raise InputError(
            f"{name} has {lengths[0]} input_ids, {lengths[1]} labels and {lengths[2]} "
            f"{TOKEN_WEIGHT}: {TOKEN_WEIGHT}[i] is the weight of labels[i], so there must be as "
            "many; cut or change all three alike"
        )


def _find_places(tokens: Sequence[Tensor], batch: Tensor) -> list[tuple[int, int]] | None:
    """Row and start in the batch [2, B, T] of each row's tokens and labels [2, L]."""
    _, rows, width = batch.shape
    lengths = [row.shape[1] for row in tokens]
    layouts = []
    if rows == len(tokens):  # padded at the end, or at the beginning
        layouts.append([(row, 0) for row in range(rows)])
        layouts.append([(row, width - length) for row, length in enumerate(lengths)])
    if rows == 1:  # packed
        layouts.append([(0, sum(lengths[:number])) for number in range(len(lengths))])
    return next((layout for layout in layouts if _fits(layout, tokens, batch)), None)


def _fits(layout: Sequence[tuple[int, int]], tokens: Sequence[Tensor], batch: Tensor) -> bool:
    """Whether the layout holds the rows; a collator may mask labels, such as the first of a row."""
    for (row, start), expected in zip(layout, tokens, strict=True):
        length = expected.shape[1]
        found = batch[:, row, start : start + length]
        if start < 0 or found.shape != expected.shape:
            return False
        ids, labels = found == expected
        if not bool(ids.all() and (labels | (found[1] == -100)).all()):
            return False
    return True
