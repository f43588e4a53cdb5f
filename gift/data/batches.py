"""Rows as tensors: packed one after the other, or padded to the longest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gift.data.encoding import Example


@dataclass(frozen=True)
class Batch:
    """Rows as a model reads them, and where it predicts their targets.

    `inputs` are keyword arguments of the model's body: packed, `input_ids` and `position_ids` int64
    [1, T] and the borders of the rows; padded, `input_ids` and `attention_mask` int64 [B, T].
    `predicts` int64 [N] has the place of every prediction in hidden states [B · T, D], `targets`
    int64 [N] the token predicted there, row after row.
    """

    inputs: dict[str, Any]
    predicts: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; see `copy_to`."""
        inputs = {
            name: copy_to(value, device) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return Batch(inputs, copy_to(self.predicts, device), copy_to(self.targets, device))


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def plan_batches(
    lengths: Sequence[int], tokens: int, *, packed: bool, rows: int | None = None
) -> list[list[int]]:
    """Groups rows of these lengths so that a batch has at most so many tokens and `rows`.

    Returns the rows' numbers. A row that is longer than `tokens` is a batch by itself; padding
    counts where rows are not packed. The longest rows come first, so that a batch that is too large
    for the memory fails at once, and rows of similar length, which need little padding, together.
    """
    batches: list[list[int]] = []
    filled = longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        size = lengths[number] if packed else longest
        if not batches or filled + size > tokens or len(batches[-1]) == rows:
            batches.append([])
            filled, longest = 0, lengths[number]
            size = longest
        batches[-1].append(number)
        filled += size
    return batches


def size_of(lengths: Sequence[int], *, packed: bool) -> int:
    """Tokens of a batch of rows of these lengths, padding included."""
    return sum(lengths) if packed else len(lengths) * max(lengths, default=0)


def make_batch(examples: Sequence[Example], *, packed: bool) -> Batch:
    """A batch on the host.

    Position t predicts token t + 1. A token that does not exist comes from no position of the
    batch: the first of a row is no target (`gift.data.encoding`).
    """
    inputs, starts = make_inputs([example.input_ids for example in examples], packed=packed)
    predicts = [
        start + np.flatnonzero(example.is_target) - 1
        for start, example in zip(starts, examples, strict=True)
    ]
    targets = [example.input_ids[example.is_target] for example in examples]
    return Batch(inputs, _int64(np.concatenate(predicts)), _int64(np.concatenate(targets)))


def make_inputs(
    rows: Sequence[np.ndarray], *, packed: bool
) -> tuple[dict[str, Any], Sequence[int]]:
    """The `inputs` of a `Batch` of rows of token ids, and the place of each row's first token."""
    lengths = [len(row) for row in rows]
    if packed:
        borders = np.cumsum([0, *lengths])
        return _packed_inputs(rows, lengths, borders), borders[:-1].tolist()
    return _padded_inputs(rows, max(lengths)), [row * max(lengths) for row in range(len(rows))]


def _packed_inputs(
    rows: Sequence[np.ndarray], lengths: Sequence[int], borders: np.ndarray
) -> dict[str, Any]:
    """Transformers' names for packed rows, and `row_lengths`, which `gift.data.packing` reads."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    cumulative = torch.from_numpy(borders.astype(np.int32))
    return {
        "input_ids": _int64(np.concatenate(rows))[None],
        "position_ids": _int64(positions)[None],
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "row_lengths": tuple(lengths),
    }


def _padded_inputs(rows: Sequence[np.ndarray], width: int) -> dict[str, Any]:
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
