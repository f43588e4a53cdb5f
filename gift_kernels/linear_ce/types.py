"""What the operator below the public functions is asked for, and what it answers."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Head(NamedTuple):
    """One model's side of the loss: hidden [N, D], head weight [V, D], bias [V] and options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None


class VocabShard(NamedTuple):
    """This rank's slice of the vocabulary: rows [start, start + V) of the head, and the group."""

    group: ProcessGroup
    start: int


class WeightTransform(NamedTuple):
    """max(w, floor) ** power, and 0 where w < threshold."""

    power: float
    floor: float
    threshold: float


class Problem(NamedTuple):
    """One call of the operator.

    Row weights are `row_weight` [N] as it is; or the transformed confidence of `guide`, or of the
    model itself with `self_weight`; or 1. `temperature` divides the guide's logits, or the model's
    own where there is neither guide nor gradient. With `rowwise` the backward will come through
    `nll`, so dW and db are not made now. Without `keep_zero_rows` rows of weight 0 may be left out
    of every product, and their statistics are then 0.
    """

    head: Head
    guide: Head | None
    target: Tensor
    row_weight: Tensor | None
    temperature: float
    self_weight: bool
    transform: WeightTransform
    ignore_index: int
    want_dh: bool
    want_dw: bool
    want_db: bool
    rowwise: bool
    with_entropy: bool
    keep_zero_rows: bool
    shard: VocabShard | None
    chunk_size: int | None


class LinearCE(NamedTuple):
    """What the operator returns; tensors that were not asked for are empty.

    Statistics are in accumulation dtype and 0 on rows that were left out. dH is unscaled: the
    gradient of each row's nll; dW and db are those of `total`.
    """

    total: Tensor  # [] weighted sum of nll
    nll: Tensor  # [N]
    lse: Tensor  # [N]
    entropy: Tensor  # [N] or [0]
    top1: Tensor  # [N] bool
    weight: Tensor  # [N]
    dh: Tensor  # [N, D] or [0]
    dw: Tensor  # [V, D] or [0]
    db: Tensor  # [V] or [0]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole_vocabulary(vocab_size: int, shard: VocabShard | None) -> int:
    """Size of the vocabulary: V, or the largest end of any rank's slice."""
    return vocab_size if shard is None else largest_of_ranks(shard.start + vocab_size, shard)


def largest_of_ranks(value: int, shard: VocabShard) -> int:
    """The maximum of an integer over the ranks that share the vocabulary."""
    device = "cuda" if torch.distributed.get_backend(shard.group) == "nccl" else "cpu"
    largest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=shard.group)
    return int(largest)
