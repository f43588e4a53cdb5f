"""Linear cross-entropy in PyTorch, one chunk of rows at a time: any device, float32 or float64.

Per chunk of B rows the logits [B, V] are the only large buffer (at most CHUNK_BYTES, or one row):
they are overwritten by exponentials, and these by the gradient of the logits. Where the device
multiplies 16-bit matrices into float32 (`matmul.mixed_products`), products use the inputs' dtype,
to which all exponentials but the target's term are rounded; elsewhere the head is upcast, one block
of VOCAB_BLOCK rows at a time. With H the hidden states, W the head, z = softcap(s·(H Wᵀ + b)), m_i
= max_v z_iv, E = exp(z − m) but 0 at the target y, R_i = Σ_v E_iv, S_i = R_i + exp(z_iy − m_i):

    nll_i = log S_i − (z_iy − m_i), which is log1p(R_i) where the target is the largest
    G_iv = (E_iv − R_i · 1[v = y_i]) · (1 − (z_iv / c)²)   the last factor only with a soft-cap c
    dH_i = s / S_i · G_i W     dW = Gᵀ diag(w s / S) H     db = Gᵀ (w s / S)

The row's largest logit is subtracted before rounding, and the sums exclude the target's term. So
nll and gradients keep their relative accuracy when all logits share a large offset, and when the
target is nearly certain.

dH is returned unscaled, so that row i can later be multiplied by any upstream gradient; a frozen
head therefore costs two matrix products in all. Logits, log-sum-exp and gradients are accumulated
in float32 (float64 for float64 inputs) whatever the dtype of the inputs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gift_kernels.linear_ce.matmul import mixed_products, wide_mm
from gift_kernels.linear_ce.types import (
    LinearCE,
    LinearInputs,
    Problem,
    VocabShard,
    WeightTransform,
    accumulation_dtype,
)
from gift_kernels.reference import transform_weight

# On a GPU products need enough rows to fill it: 1024 for a vocabulary of 128 thousand.
CHUNK_BYTES = 1 << 29
# On a CPU a chunk should fit into the caches; with fewer rows the head is read too often.
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS = 1 << 24, 128
VOCAB_BLOCK = 8192


class RowStats(NamedTuple):
    """Float [N] in accumulation dtype, top1 bool [N]; entropy may be empty."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    top1: Tensor
    largest: Tensor


class Exponentials(NamedTuple):
    """Softmax terms of a chunk: E times soft-cap slopes [C, V], R and S [C], slope of targets."""

    values: Tensor
    rest: Tensor
    total: Tensor
    target_slope: Tensor | float


class Gradients(NamedTuple):
    """dh [N, D] without row weights, dw [V, D] and db [V] with them; None if not requested."""

    dh: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def solve(problem: Problem) -> LinearCE:
    """Runs one call of the operator; leaves out ignored rows and, if allowed, rows of weight 0."""
    head, guide, target, transform = (
        problem.head,
        problem.guide,
        problem.target,
        problem.transform,
    )
    chunks = {"shard": problem.shard, "chunk_size": problem.chunk_size}
    rows = (target != problem.ignore_index).nonzero().squeeze(1)  # [n]
    row_count = max(1, len(rows))
    dtype = accumulation_dtype(head.hidden.dtype)
    if guide is not None:
        guide = guide._replace(hidden=guide.hidden[rows])
        nll = row_stats(guide, target[rows], temperature=problem.temperature, **chunks).nll
        weight = transform_weight(torch.exp(-nll), transform).to(dtype)
    elif problem.row_weight is not None:
        weight = transform_weight(problem.row_weight[rows].to(dtype), transform)
    else:
        weight = torch.ones(rows.shape, dtype=dtype, device=rows.device)
        weight = weight if problem.self_weight else transform_weight(weight, transform)
    if not problem.keep_zero_rows:
        rows, weight = rows[weight != 0], weight[weight != 0]
    head = head._replace(hidden=head.hidden[rows])
    if problem.want_dh or problem.want_dw or problem.want_db:
        stats, gradients = stats_and_gradients(
            head,
            target[rows],
            weight,
            want_dh=problem.want_dh,
            want_dw=problem.want_dw and not problem.rowwise,
            want_db=problem.want_db and not problem.rowwise,
            self_weight=transform if problem.self_weight else None,
            with_entropy=problem.with_entropy,
            **chunks,
        )
    else:
        stats = row_stats(
            head,
            target[rows],
            temperature=problem.temperature if guide is None else 1.0,
            with_entropy=problem.with_entropy,
            **chunks,
        )
        gradients = Gradients(None, None, None)
    if problem.self_weight:
        weight = transform_weight(torch.exp(-stats.nll), transform)
    return _scatter(problem, rows, row_count, stats, weight, gradients)


def solve_head_gradient(
    head: LinearInputs,
    target: Tensor,
    row_factor: Tensor,
    *,
    ignore_index: int,
    want_dw: bool,
    want_db: bool,
    shard: VocabShard | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """dW [V, D] and db [V] of Σ_i row_factor_i · nll_i; empty where not wanted."""
    rows = (target != ignore_index).nonzero().squeeze(1)
    _, gradients = stats_and_gradients(
        head._replace(hidden=head.hidden[rows]),
        target[rows],
        row_factor[rows],
        want_dh=False,
        want_dw=want_dw,
        want_db=want_db,
        shard=shard,
        chunk_size=chunk_size,
    )
    empty = row_factor.new_empty(0)
    dw, db = gradients.dw, gradients.db
    return dw if dw is not None else empty, db if db is not None else empty.clone()


def _scatter(
    problem: Problem,
    rows: Tensor,
    row_count: int,
    stats: RowStats,
    weight: Tensor,
    gradients: Gradients,
) -> LinearCE:
    """Scatters the results of the computed rows to all N rows; the other rows are 0."""
    count = problem.target.shape[0]

    def full(values: Tensor) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)

    loss, dh = torch.where(weight == 0, 0, weight * stats.nll), gradients.dh
    return LinearCE(
        loss=full(loss) if problem.rowwise else loss.sum(),
        row_count=loss.new_full((), row_count),
        nll=full(stats.nll),
        weight=full(weight),
        lse=full(stats.lse) if problem.with_stats else None,
        top1=full(stats.top1) if problem.with_stats else None,
        largest=full(stats.largest) if problem.with_stats else None,
        entropy=full(stats.entropy) if problem.with_entropy else None,
        dh=full(dh) if dh is not None else None,
        dw=gradients.dw,
        db=gradients.db,
    )


def rows_per_chunk(
    vocab_size: int, dtype: torch.dtype, chunk_size: int | None = None, device: str = "cuda"
) -> int:
    """How many rows of logits are held at once."""
    if chunk_size is not None:
        return chunk_size
    row = vocab_size * accumulation_dtype(dtype).itemsize
    most = max(1, CHUNK_BYTES // row)
    if device == "cpu":
        return min(most, max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // row))
    return most // 128 * 128 if most > 128 else most  # whole tiles of a product


def row_stats(
    head: LinearInputs,
    target: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    shard: VocabShard | None = None,
    chunk_size: int | None = None,
) -> RowStats:
    """Statistics of all rows; no gradient work."""
    parts = [
        _chunk_stats(_logits(head, rows), target[rows], with_entropy, shard, temperature)[0]
        for rows in _chunks(head, shard, chunk_size)
    ]
    return _concatenate(parts, head, target)


def stats_and_gradients(
    head: LinearInputs,
    target: Tensor,
    row_weight: Tensor,
    *,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    self_weight: WeightTransform | None = None,
    with_entropy: bool = False,
    shard: VocabShard | None = None,
    chunk_size: int | None = None,
) -> tuple[RowStats, Gradients]:
    """Statistics and gradients in one pass over the rows.

    `row_weight` [N] enters dw and db only; with `self_weight` each chunk's own nll replaces it.
    """
    hidden, weight = head.hidden, head.weight
    dtype = accumulation_dtype(hidden.dtype)
    dh = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if want_dh else None
    dw = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if want_dw else None
    db = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device) if want_db else None
    # Weighted probabilities underflow in float16.
    operand = dtype if hidden.dtype == torch.float16 else _operand_dtype(head)
    parts = []
    for rows in _chunks(head, shard, chunk_size):
        logits = _logits(head, rows)
        stats, exponentials = _chunk_stats(
            logits, target[rows], with_entropy, shard, slope_softcap=head.logit_softcap
        )
        parts.append(stats)
        factor = head.logit_scale / exponentials.total
        if dh is not None:
            _add_hidden_gradient_(dh[rows], head, exponentials, target[rows], shard)
            dh[rows] *= factor.unsqueeze(1)
        if dw is None and db is None:
            continue
        _exponentials_to_gradient_(exponentials, target[rows], shard)
        if self_weight is not None:
            chunk_weight = transform_weight(torch.exp(-stats.nll), self_weight)
        else:
            chunk_weight = row_weight[rows]
        counts = chunk_weight != 0
        # 0 · NaN is NaN: zero the hidden states of rows of weight 0 so that no NaN reaches dW.
        counted = scale_rows(hidden[rows].to(dtype), counts).to(operand)
        row_factor = torch.where(counts, chunk_weight * factor, 0)
        for block in _vocab_blocks(weight.shape[0]):
            gradient = scale_rows(logits[:, block], row_factor)
            if dw is not None:
                wide_mm(gradient.to(operand).T, counted, dw[block], accumulate=True)
            if db is not None:
                db[block] += gradient.sum(0)
    if dh is not None and shard is not None:
        dist.all_reduce(dh, group=shard.group)
    return _concatenate(parts, head, target), Gradients(dh, dw, db)


def _add_hidden_gradient_(
    dh: Tensor,
    head: LinearInputs,
    exponentials: Exponentials,
    target: Tensor,
    shard: VocabShard | None,
) -> None:
    """Adds G W of a chunk to dh [C, D]."""
    values, rest, _, slope = exponentials
    operand = _operand_dtype(head)
    # Scales the largest exponential of a row to 2^15, because float16 underflows at 6e-8.
    scale = None
    if operand == torch.float16:
        # At least 2^-100: a scale of 0 would turn negligible values into NaN.
        scale = values.amax(1, keepdim=True).clamp(min=2.0**-100) * 2.0**-15
    for block in _vocab_blocks(head.weight.shape[0]):
        part = values[:, block] if scale is None else values[:, block] / scale
        wide_mm(part.to(operand), head.weight[block].to(operand), dh, accumulate=True)
    if scale is not None:
        dh *= scale
    # The target's term is added unrounded, because it cancels the others.
    column, found = _local_target(target, values.shape[1], shard)
    dh -= scale_rows(head.weight[column].to(dh.dtype), found * rest * slope)


def scale_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """rows [N, X] times factor [N]; a factor of 0 gives exactly 0, also for infinity and NaN."""
    factor = factor.to(rows.dtype).unsqueeze(1)
    return torch.where(factor == 0, 0, rows * factor)


def _chunks(
    head: LinearInputs, shard: VocabShard | None, chunk_size: int | None
) -> Iterator[slice]:
    # Ranks with slices of different sizes need equal chunks for their collectives to match.
    vocab_size = head.weight.shape[0] if shard is None else shard.most
    step = rows_per_chunk(vocab_size, head.hidden.dtype, chunk_size, head.hidden.device.type)
    for start in range(0, head.hidden.shape[0], step):
        yield slice(start, start + step)


def _vocab_blocks(vocab_size: int) -> Iterator[slice]:
    for start in range(0, vocab_size, VOCAB_BLOCK):
        yield slice(start, start + VOCAB_BLOCK)


def _operand_dtype(head: LinearInputs) -> torch.dtype:
    """The dtype of the operands of products: that of the inputs, or that of the sums."""
    dtype = head.hidden.dtype
    return dtype if mixed_products(head.hidden.device, dtype) else accumulation_dtype(dtype)


def _logits(head: LinearInputs, rows: slice) -> Tensor:
    dtype = accumulation_dtype(head.hidden.dtype)
    operand = _operand_dtype(head)
    hidden = head.hidden[rows].to(operand)  # [C, D]
    vocab_size = head.weight.shape[0]
    logits = torch.empty(hidden.shape[0], vocab_size, dtype=dtype, device=hidden.device)
    for block in _vocab_blocks(vocab_size):
        wide_mm(hidden, head.weight[block].to(operand).T, logits[:, block])
    if head.bias is not None:
        logits += head.bias.to(dtype)
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    if head.logit_softcap is not None:
        logits.div_(head.logit_softcap).tanh_().mul_(head.logit_softcap)
    return logits


def _chunk_stats(
    logits: Tensor,
    target: Tensor,
    with_entropy: bool,
    shard: VocabShard | None,
    temperature: float = 1.0,
    slope_softcap: float | None = None,
) -> tuple[RowStats, Exponentials]:
    """Statistics; overwrites logits by exponentials, times the slopes of a soft-cap if given."""
    column, found = _local_target(target, logits.shape[1], shard)
    target_logit = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    largest = logits.amax(1)
    if shard is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.group)
    # Replaces the target's logit: its exponential must be 0, but it must be finite if a soft-cap
    # slope is computed from it, because 0 · ∞ is NaN.
    absent = -torch.inf if slope_softcap is None else -1e4 * max(1.0, slope_softcap)
    without = torch.where(found, absent, target_logit)
    logits.scatter_(1, column.unsqueeze(1), without.unsqueeze(1))
    rest, moment, ones = (torch.zeros_like(largest) for _ in range(3))
    for block in _vocab_blocks(logits.shape[1]):
        z = logits[:, block]
        slope = 1 - (z / slope_softcap) ** 2 if slope_softcap is not None else None
        z -= largest.unsqueeze(1)
        if temperature != 1.0:
            z /= temperature
        if with_entropy:
            e = torch.exp(z)
            moment += torch.where(e > 0, e * z, 0).sum(1)
            # Terms of exactly 1 are counted separately, so that small terms are not rounded away:
            # an entropy near 0 is their sum.
            ones += (e == 1).sum(1)
            rest += torch.where(e == 1, 0, e).sum(1)
            z.copy_(e)
        else:
            rest += z.exp_().sum(1)
        if slope is not None:
            z *= slope
    owners = found.to(logits.dtype)
    if shard is not None:
        sums = torch.stack([rest, moment, ones, torch.where(found, target_logit, 0), owners])
        dist.all_reduce(sums, group=shard.group)
        rest, moment, ones, target_logit, owners = sums.unbind()
    # Out-of-range targets occur only on devices where checking them would synchronize.
    target_logit = torch.where(owners > 0, target_logit, torch.nan)
    top1 = target_logit >= largest
    gap = (target_logit - largest) / temperature
    own = torch.exp(gap)
    log_total = torch.log1p(torch.where(top1, rest + ones, rest + own + (ones - 1)))
    rest = rest + ones
    total = rest + own
    entropy = logits.new_empty(0)
    if with_entropy:
        entropy = log_total - (moment + torch.where(own > 0, own * gap, 0)) / total
    slope = 1 - (target_logit / slope_softcap) ** 2 if slope_softcap is not None else 1.0
    lse = log_total + largest / temperature
    stats = RowStats(log_total - gap, lse, entropy, top1, torch.exp(-log_total))
    return stats, Exponentials(logits, rest, total, slope)


def _exponentials_to_gradient_(
    exponentials: Exponentials, target: Tensor, shard: VocabShard | None
) -> None:
    """Overwrites the exponentials with G: the gradient of each row's nll, times S / s."""
    values, rest, _, slope = exponentials
    column, found = _local_target(target, values.shape[1], shard)
    values.scatter_add_(1, column.unsqueeze(1), -(found * rest * slope).unsqueeze(1))


def _local_target(
    target: Tensor, vocab_size: int, shard: VocabShard | None
) -> tuple[Tensor, Tensor]:
    """Each target's column in this slice of the head (0 if outside), and whether it is inside."""
    column = target - shard.start if shard is not None else target
    found = (column >= 0) & (column < vocab_size)
    return torch.where(found, column, 0), found


def _concatenate(parts: list[RowStats], head: LinearInputs, target: Tensor) -> RowStats:
    if parts:
        return RowStats(*(torch.cat(values) for values in zip(*parts, strict=True)))
    empty = torch.empty(0, dtype=accumulation_dtype(head.hidden.dtype), device=target.device)
    return RowStats(empty, empty, empty, empty.bool(), empty)
