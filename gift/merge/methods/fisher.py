"""Σ F_i θ_i / Σ F_i with F_i the models' diagonal Fisher estimates (Fisher merging, equation 6).

The models are the instruct model and θ₀ + τ; where all F_i are 0 the result is the plain mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    import torch

    models = torch.stack(rows.models)
    weights = torch.stack(list(rows.fishers)).to(models.dtype)
    total = weights.sum(0)
    # Fisher values of large models are tiny; shares first, so that no product underflows.
    shares = torch.where(total > 0, weights / total.clamp(min=1e-38), 1 / len(models))
    return (shares * models).sum(0)


METHOD = Method(
    name="fisher",
    about="Averages instruct and task model, each weight by how much its model depends on it.",
    formula="Σ F θ / Σ F over instruct and origin + τ",
    source="Fisher merging, arXiv 2111.09832; statistics by `gift merge-statistics`",
    merge=merge,
    statistics="diagonal",
)
