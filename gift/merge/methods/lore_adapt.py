"""θ_B + α Σ τ + β · the low-rank part of θ_I − θ_B (LoRE-Adapt).

The part is the truncated SVD of the smallest rank that holds a share of the squared singular
values. The default share of 0.5 was not checked against the paper. For tensors that are single
rows or columns the whole difference is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gift.merge.method import Method, Rows, WholeTensor
from gift.merge.methods.re_adapt import add_instruct_part

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


class LowRankPart(NamedTuple):
    """A matrix of rank k as left [M, k] @ right [k, K]."""

    left: Tensor
    right: Tensor


def prepare(tensor: WholeTensor, options: MergeOptions) -> Callable[[int], LowRankPart] | None:
    """The low-rank part of a matrix of the stack; only the last one stays in memory."""
    if tensor.is_vector:
        return None

    @functools.lru_cache(maxsize=1)
    def part_of(matrix: int) -> LowRankPart:
        return low_rank_part(tensor.instruct_part(matrix), options.energy_share)

    return part_of


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    assert rows.base is not None
    part = rows.instruct - rows.base
    if rows.known is not None:
        whole: LowRankPart = rows.known(rows.matrix)
        part = whole.left[rows.begin : rows.begin + len(part)] @ whole.right
    return add_instruct_part(rows, part, options)


def low_rank_part(matrix: Tensor, share: float) -> LowRankPart:
    """The truncated SVD of the smallest rank that holds `share` of the squared singular values.

    Computed from the Gram matrix of the shorter side in float64: Δ V V^T with V the leading
    eigenvectors of Δ^T Δ (or U U^T Δ), which equals the truncated SVD.
    """
    import torch

    rows, width = matrix.shape
    wide = width > rows
    gram = torch.zeros(min(rows, width), min(rows, width), dtype=torch.float64)
    gram = gram.to(matrix.device)
    for block in matrix.split(2048, dim=1 if wide else 0):
        precise = block.double()
        gram += precise @ precise.T if wide else precise.T @ precise
    energies, vectors = torch.linalg.eigh(gram)
    energies = energies.flip(0).clamp(min=0)
    total = energies.sum()
    rank = int((energies.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 0
    leading = vectors.flip(1)[:, :rank].to(matrix.dtype)
    if wide:
        return LowRankPart(leading, leading.T @ matrix)
    return LowRankPart(matrix @ leading, leading.T)


METHOD = Method(
    name="lore-adapt",
    about="As re-adapt, with the low-rank part of instruct - base alone.",
    formula="base + α τ + β · low-rank part of (instruct - base)",
    source="LoRE-Adapt, arXiv 2405.15007",
    merge=merge,
    settings=("task_weight", "instruct_weight", "energy_share"),
    needs_base=True,
    prepare=prepare,
)
