"""θ₀ + λ Σ τ with entries dropped at random and the rest rescaled (DARE)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows
from gift.merge.methods.task_arithmetic import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    return weighted_sum(rows.origin, dropped_vectors(rows, options), options.task_weight)


def dropped_vectors(rows: Rows, options: MergeOptions) -> list[Tensor]:
    """The task vectors after dropping and rescaling."""
    return [
        drop(vector, options.drop_rate, options.dare_seed, f"{rows.key}\n{number}")
        for number, vector in enumerate(rows.vectors)
    ]


def drop(vector: Tensor, rate: float, seed: int, key: str) -> Tensor:
    """Drops entries with probability `rate` and divides the kept by 1 − rate.

    The random numbers depend on `seed` and `key` only (the tensor's name, its vector and block),
    so that a resumed or re-ordered merge draws the same ones, on any device.
    """
    import torch

    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    kept = torch.rand(vector.shape, generator=generator) >= rate
    return torch.where(kept.to(vector.device), vector / (1 - rate), 0)


METHOD = Method(
    name="dare",
    about="Adds the change with entries dropped at random and the rest enlarged instead.",
    formula="origin + λ Σ τ with entries dropped at random and the rest rescaled",
    source="DARE, arXiv 2311.03099",
    merge=merge,
    settings=("task_weight", "drop_rate", "dare_seed"),
)
