"""θ₀ + λ Σ τ (Task Arithmetic, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    return weighted_sum(rows.origin, rows.vectors, options.task_weight)


def weighted_sum(origin: Tensor, vectors: Sequence[Tensor], weight: float) -> Tensor:
    """`origin` + `weight` · the sum of the vectors."""
    import torch

    return origin + weight * torch.stack(list(vectors)).sum(0)


def sum_weight(options: MergeOptions, adapters: int, has_base: bool) -> float | None:
    """With a base, the result is θ_I + w Σ τ only if λ is 1: else θ_B does not cancel."""
    return options.task_weight if not has_base or options.task_weight == 1 else None


METHOD = Method(
    name="task-arithmetic",
    about="Adds the adapter's change times a factor.",
    formula="origin + λ Σ τ",
    source="arXiv 2212.04089",
    merge=merge,
    settings=("task_weight",),
    sum_weight=sum_weight,
)
