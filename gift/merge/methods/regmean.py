"""(Σ G_i)⁻¹ Σ G_i W_i with G_i = X_i^T X_i of a layer's inputs (RegMean, equation 2).

The models are the instruct model and θ₀ + τ. What has no Gram matrix (all but linear layers) gets
the plain mean, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from gift.merge.method import Method, Rows, WholeTensor

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


class System(NamedTuple):
    """The scaled Gram matrices [n, K, K] of a tensor's inputs; the Cholesky factor of their sum."""

    grams: Tensor
    factor: Tensor


def prepare(tensor: WholeTensor, options: MergeOptions) -> System | None:
    grams = tensor.grams()
    return make_system(grams, options.off_diagonal) if grams else None


def make_system(grams: Sequence[Tensor], off_diagonal: float) -> System:
    """Scales the off-diagonal entries of each G_i and factors their sum.

    The paper's scale is 0.9 (section 3.2). A millionth of the mean diagonal is added to every G_i,
    so that weights of inputs that never occurred get the plain mean.
    """
    import torch

    scaled = []
    ridge = 1e-6 * float(sum(gram.diagonal().mean() for gram in grams)) / len(grams)
    for gram in grams:
        diagonal = gram.diagonal().clone()
        scaled.append(off_diagonal * gram)
        scaled[-1].diagonal().copy_(diagonal + max(ridge, 1e-30))
    stacked = torch.stack(scaled)
    return System(stacked, torch.linalg.cholesky(stacked.sum(0)))


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    """Weights are stored [M, K], the transpose of the paper's W; each row is solved alone."""
    import torch

    models, system = rows.models, rows.known
    if system is None:
        return torch.stack(models).mean(0)
    products = torch.zeros_like(models[0], dtype=system.factor.dtype)
    for model, gram in zip(models, system.grams, strict=True):
        products += model.to(gram.dtype) @ gram
    return torch.cholesky_solve(products.T, system.factor).T.to(models[0].dtype)


METHOD = Method(
    name="regmean",
    about="Averages the two models so that each layer's outputs come closest to those of both.",
    formula="(Σ G)^-1 Σ G W over instruct and origin + τ",
    source="RegMean, arXiv 2212.09849; statistics by `gift merge-statistics`",
    merge=merge,
    settings=("off_diagonal",),
    statistics="gram",
    prepare=prepare,
)
