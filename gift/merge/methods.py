"""Merge methods as pure functions on tensors, each with its source.

Letters: M out, K in. θ_I is the instruct model's tensor, θ_B the base model's, θ₀ the origin that
task vectors τ are added to: θ_B where a base is given, else θ_I. All tensors of a call have one
shape and one floating-point dtype (float32, or float64 for float64 models); results are rounded to
the model's dtype once, by the caller. Functions named `*_block` may be called on any rows of a
tensor; what has to be known of the whole tensor comes first (a threshold, a projection, Grams).

The method `lora` (GIFT, arXiv 2605.01256; Shadow-FT, 2505.12716) is `gift_kernels.lora_merge`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def task_arithmetic_block(origin: Tensor, vectors: Sequence[Tensor], weight: float) -> Tensor:
    """θ₀ + λ Σ τ_i (Task Arithmetic, arXiv 2212.04089, section 2)."""
    return origin + weight * torch.stack(list(vectors)).sum(0)


def re_adapt_block(
    base: Tensor, instruct_part: Tensor, task: Tensor, task_weight: float, instruct_weight: float
) -> Tensor:
    """θ_B + α τ + β (θ_I − θ_B) (RE-Adapt, arXiv 2405.15007).

    For LoRE-Adapt, `instruct_part` is the low-rank part of θ_I − θ_B.
    """
    return base + task_weight * task + instruct_weight * instruct_part


class LowRankPart(NamedTuple):
    """A matrix of rank k as left [M, k] @ right [k, K]."""

    left: Tensor
    right: Tensor


def low_rank_part(matrix: Tensor, share: float) -> LowRankPart:
    """The truncated SVD of the smallest rank that holds `share` of the squared singular values.

    LoRE-Adapt (arXiv 2405.15007); its default share of 0.5 is quoted from memory. Computed from the
    Gram matrix of the shorter side in float64: Δ V V^T with V the leading eigenvectors of Δ^T Δ (or
    U U^T Δ), which equals the truncated SVD.
    """
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


def magnitude_threshold(blocks: Iterable[Tensor], keep: float) -> float:
    """The k-th largest magnitude over all blocks, k = ⌊keep · n⌋ and at least 1.

    Exact in one number's memory: float32 magnitudes sort like their bit patterns, so two
    histograms, of the upper and of the lower 16 bits, find the k-th one. `blocks` is gone through
    twice, so it must be a sequence or another re-iterable. float64 is compared in float32.
    """
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
    return block.to("cpu", torch.float32).abs().contiguous().view(torch.int32).flatten()


def _bucket_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest value, and how many values lie above it."""
    from_above = counts.flip(0).cumsum(0)
    position = int((from_above < wanted).sum())
    return len(counts) - 1 - position, int(from_above[position] - counts.flip(0)[position])


def ties_block(
    origin: Tensor, vectors: Sequence[Tensor], thresholds: Sequence[float], weight: float
) -> Tensor:
    """θ₀ + λ · mean of the task vectors that agree with the elected sign (TIES, arXiv 2306.01708).

    Trim: entries below their vector's threshold become 0. Elect: the sign of the sum of the trimmed
    vectors. Merge: the mean over the vectors whose entry has that sign. With one vector nothing is
    elected and TIES is magnitude trimming. The paper takes the threshold over the whole model, this
    program (as mergekit does) over each tensor, because a model is never held in memory.
    """
    stacked = torch.stack(list(vectors))
    limits = torch.tensor(thresholds, dtype=torch.float32, device=stacked.device)
    large = stacked.abs().float() >= limits.view(-1, *[1] * origin.ndim)
    trimmed = torch.where(large, stacked, 0)
    elected = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == elected) & (trimmed != 0)
    total = torch.where(agreeing, trimmed, 0).sum(0)
    return origin + weight * total / agreeing.sum(0).clamp(min=1)


def dare_block(vector: Tensor, drop_rate: float, seed: int, key: str) -> Tensor:
    """Drops entries with probability p and divides the kept by 1 − p (DARE, arXiv 2311.03099).

    The random numbers depend on `seed` and `key` only (the tensor's name, its vector and block),
    so that a resumed or re-ordered merge draws the same ones, on any device.
    """
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    kept = torch.rand(vector.shape, generator=generator) >= drop_rate
    return torch.where(kept.to(vector.device), vector / (1 - drop_rate), 0)


def fisher_block(models: Sequence[Tensor], fishers: Sequence[Tensor]) -> Tensor:
    """Σ λ F_i θ_i / Σ λ F_i with λ = 1/n (Fisher merging, arXiv 2111.09832, equation 6).

    F_i are diagonal Fisher estimates of the models' parameters. Where all are 0 the result is the
    plain mean.
    """
    weights = torch.stack(list(fishers)).to(models[0].dtype)
    total = weights.sum(0)
    # Fisher values of large models are tiny; shares first, so that no product underflows.
    shares = torch.where(total > 0, weights / total.clamp(min=1e-38), 1 / len(models))
    return (shares * torch.stack(list(models))).sum(0)


class RegMeanSystem(NamedTuple):
    """The scaled Gram matrices [n, K, K] of a tensor's inputs; the Cholesky factor of their sum."""

    grams: Tensor
    factor: Tensor


def regmean_system(grams: Sequence[Tensor], off_diagonal: float) -> RegMeanSystem:
    """Scales the off-diagonal entries of each G_i = X_i^T X_i and factors their sum.

    RegMean (arXiv 2212.09849, section 3.2; the scale is 0.9 there). A millionth of the mean
    diagonal is added to every G_i, so that inputs that never occurred get the plain mean.
    """
    scaled = []
    ridge = 1e-6 * float(sum(gram.diagonal().mean() for gram in grams)) / len(grams)
    for gram in grams:
        diagonal = gram.diagonal().clone()
        scaled.append(off_diagonal * gram)
        scaled[-1].diagonal().copy_(diagonal + max(ridge, 1e-30))
    stacked = torch.stack(scaled)
    return RegMeanSystem(stacked, torch.linalg.cholesky(stacked.sum(0)))


def regmean_block(models: Sequence[Tensor], system: RegMeanSystem) -> Tensor:
    """(Σ G_i)⁻¹ Σ G_i W_i for weights stored [M, K], of which W_i is the transpose.

    RegMean, arXiv 2212.09849, equation 2. Rows are independent of one another.
    """
    products = torch.zeros_like(models[0], dtype=system.factor.dtype)
    for model, gram in zip(models, system.grams, strict=True):
        products += model.to(gram.dtype) @ gram
    return torch.cholesky_solve(products.T, system.factor).T.to(models[0].dtype)


def mean_block(models: Sequence[Tensor]) -> Tensor:
    """The plain mean, which RegMean gives to all parameters that are no linear layer's weight."""
    return torch.stack(list(models)).mean(0)


def dora_block(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, magnitude: Tensor
) -> Tensor:
    """m · V / ‖V‖ per output row, V = W + scale · B A (DoRA, arXiv 2402.09353, equation 5)."""
    direction = weight + scale * (lora_b @ lora_a)
    return direction * (magnitude / torch.linalg.vector_norm(direction, dim=1)).unsqueeze(1)
