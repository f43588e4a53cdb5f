"""θ₀ + λ · the mean of the trimmed task vectors that agree with the elected sign (TIES-Merging).

Trim: entries below their vector's threshold become 0. Elect: the sign of the sum of the trimmed
vectors. Merge: the mean over the vectors whose entry has that sign. With one vector nothing is
elected and TIES is magnitude trimming. The paper takes the threshold over the whole model, this
program (as mergekit does) over each tensor, because a model is never held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows, WholeTensor

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def prepare(tensor: WholeTensor, options: MergeOptions) -> list[float]:
    """Every task vector's threshold."""
    keep = options.trim_keep / 100
    return [magnitude_threshold(vector, keep) for vector in tensor.vectors()]


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    return rows.origin + elected_mean(rows.vectors, rows.known, options.task_weight)


def elected_mean(
    vectors: Sequence[Tensor], thresholds: Sequence[float], weight: float = 1.0
) -> Tensor:
    """`weight` · the mean of the entries that reach their threshold and have the elected sign."""
    import torch

    stacked = torch.stack(list(vectors))
    limits = torch.tensor(thresholds, dtype=torch.float32, device=stacked.device)
    large = stacked.abs().float() >= limits.view(-1, *[1] * (stacked.ndim - 1))
    trimmed = torch.where(large, stacked, 0)
    elected = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == elected) & (trimmed != 0)
    total = torch.where(agreeing, trimmed, 0).sum(0)
    return weight * total / agreeing.sum(0).clamp(min=1)


def magnitude_threshold(blocks: Iterable[Tensor], keep: float) -> float:
    """The k-th largest magnitude over all blocks, k = ⌊keep · n⌋ and at least 1.

    Exact in constant memory: float32 magnitudes sort like their bit patterns, so two histograms, of
    the upper and of the lower 16 bits, find the k-th one. `blocks` is iterated twice, so it must be
    a sequence or another re-iterable. float64 is compared in float32.
    """
    import torch

    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for block in blocks:
        upper += torch.bincount((_magnitude_bits(block) >> 16), minlength=1 << 16)
    wanted = max(1, int(keep * int(upper.sum())))
    bucket, above = _bucket_of(upper, wanted)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for block in blocks:
        bits = _magnitude_bits(block)
        inside = bits[(bits >> 16) == bucket] & 0xFFFF
        lower += torch.bincount(inside, minlength=1 << 16)
    rest, _ = _bucket_of(lower, wanted - above)
    return torch.tensor((bucket << 16) | rest, dtype=torch.int32).view(torch.float32).item()


def _magnitude_bits(block: Tensor) -> Tensor:
    import torch

    return block.to("cpu", torch.float32).abs().contiguous().view(torch.int32).flatten()


def _bucket_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest value, and how many values lie above it."""
    from_above = counts.flip(0).cumsum(0)
    position = int((from_above < wanted).sum())
    return len(counts) - 1 - position, int(from_above[position] - counts.flip(0)[position])


METHOD = Method(
    name="ties",
    about="Adds the largest entries of each change, where the changes agree on the sign.",
    formula="origin + λ · mean of the trimmed τ that agree with the elected sign",
    source="TIES-Merging, arXiv 2306.01708",
    merge=merge,
    settings=("task_weight", "trim_keep"),
    prepare=prepare,
    note=lambda options, vectors: (
        "TIES with one task vector is magnitude trimming only: there is no other vector to elect a "
        "sign with"
        if vectors == 1
        else ""
    ),
)
