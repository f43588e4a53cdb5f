"""Rows as padded tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from gift.data import Example


def plan_batches(examples: Sequence[Example], batch_tokens: int) -> list[list[Example]]:
    """Groups rows by length so that rows × longest row stays within the budget (one row at least).

    The longest rows come first, so that a budget that is too large for the memory fails at once.
    """
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: (-len(example.input_ids), example.row)):
        longest = len(batches[-1][0].input_ids) if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def pad_batch(
    examples: Sequence[Example], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T], attention mask [B, T] and predicting positions bool [B, T].

    Position t predicts token t + 1, so the mask is the target mask moved one to the left.
    """
    length = max(len(example.input_ids) for example in examples)
    ids = np.zeros((len(examples), length), np.int64)
    attention = np.zeros((len(examples), length), np.int64)
    predicts = np.zeros((len(examples), length), bool)
    for number, example in enumerate(examples):
        size = len(example.input_ids)
        ids[number, :size] = example.input_ids
        attention[number, :size] = 1
        predicts[number, : size - 1] = example.is_target[1:]
    arrays = (ids, attention, predicts)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)  # pyright: ignore


def target_ids(examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """Target tokens int64 of the rows one after the other, in the order of `pad_batch`."""
    ids = np.concatenate([example.input_ids[example.is_target] for example in examples])
    return torch.from_numpy(ids.astype(np.int64)).to(device)
