"""The valid tokens of a call, their running sums and their statistics.

N rows of the caller, n of them valid, D hidden, V vocabulary.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from triton import knobs

from gift_kernels.linear_ce.triton.chunk_size import Plan, cdiv, logit_factors
from gift_kernels.linear_ce.triton.kernels import row_gradients
from gift_kernels.linear_ce.triton.kernels import rows as triton_rows
from gift_kernels.linear_ce.triton.kernels.logits import NO_REFERENCE
from gift_kernels.linear_ce.triton.launch import Launch
from gift_kernels.linear_ce.types import NO_TRANSFORM, LinearInputs, VocabShard, WeightTransform

LINE_BLOCK = 64 if knobs.runtime.interpret else 1024


class Rows(NamedTuple):
    """The valid tokens of a call: rows that are not ignored and, unless requested, not of weight 0.

    Entries of `index` past the number of valid tokens are 0, a row that exists.
    """

    index: Tensor  # [N] int32, the caller's row of each valid token
    place: Tensor  # [N] int32, position of each of the caller's rows in `index`, or −1
    count: Tensor  # [1] int32, the number of valid tokens
    weight: Tensor  # [N] 0 on ignored rows; a confidence once `finish_rows` has found it
    row_count: Tensor  # [] rows that are not ignored, at least 1


class RowState(NamedTuple):
    """Running sums of valid tokens, in their order, after some of the columns."""

    parts: Tensor  # [4, N] ref, S, S2, M, as defined in kernels/rows.py
    target_logit: Tensor | None  # [N] accumulators of targets, NaN where not seen
    local_target: Tensor  # [N] int32, row of this head or −1


class Asked(NamedTuple):
    """What a pass computes besides each row's nll, its weight and their product."""

    stats: bool = False  # lse, top1 and largest
    entropy: bool = False
    dh: bool = False
    factors: bool = False
    confidence: WeightTransform | None = None  # of confidences, if they are the weights


class RowStats(NamedTuple):
    """Statistics in the caller's order, 0 on rows that are not valid tokens."""

    loss: Tensor  # [N] weight times nll, exactly 0 where the weight is
    nll: Tensor  # [N]
    lse: Tensor | None  # [N]
    top1: Tensor | None  # [N] bool
    largest: Tensor | None  # [N] the largest probability
    entropy: Tensor | None  # [N]


class RowFactors(NamedTuple):
    """Factors of each row for a head's gradient, in the caller's order except `local_target`.

    dH = factor · Σ E W + target_factor · W_y, and share · 2^(bits · (x − ref)) is a probability.
    """

    factor: Tensor  # [N]
    target_factor: Tensor  # [N]
    ref: Tensor  # [N]
    share: Tensor  # [N]
    local_target: Tensor  # [N] int32, as in RowState


def valid_tokens(
    target: Tensor,
    ignore_index: int,
    weight: Tensor | None = None,
    transform: WeightTransform = NO_TRANSFORM,
    *,
    keep_zero_rows: bool = False,
) -> Rows:
    """Finds the rows [N] that are not ignored and whose weight, transformed, is not 0.

    Without weights [N] all are 1. Their number stays on the device, without synchronisation.
    """
    count, device = target.shape[0], target.device
    rows = Rows(
        index=torch.empty(count, dtype=torch.int32, device=device),
        place=torch.empty(count, dtype=torch.int32, device=device),
        count=torch.empty(1, dtype=torch.int32, device=device),
        weight=torch.empty(count, dtype=torch.float32, device=device),
        row_count=torch.empty((), dtype=torch.float32, device=device),
    )
    _compact_launch(device, transform, keep_zero_rows)(
        triton_rows._compact_kernel,
        (1, 1, 1),
        target,
        None if weight is None else weight.contiguous(),
        *rows,
        count,
        ignore_index,
    )
    return rows


@functools.lru_cache(maxsize=256)
def _compact_launch(
    device: torch.device, transform: WeightTransform, keep_zero_rows: bool
) -> Launch:
    return Launch(
        triton_rows.Transform(transform.power, transform.floor, transform.threshold),
        HAS_POWER=transform.power != 1,
        KEEP_ZERO_ROWS=keep_zero_rows,
        BLOCK=LINE_BLOCK,
    )


def new_state(head: LinearInputs) -> RowState:
    """Memory for the state of all rows; `Chunk.gather` starts it."""
    count, device = head.hidden.shape[0], head.hidden.device
    return RowState(
        torch.empty(4, count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )


def combine_shards(state: RowState, shard: VocabShard, bits: float) -> None:
    """All-reduces the sums over this rank's columns to the whole vocabulary, in place.

    References are not reduced: E of this rank's columns was computed with them.
    """
    parts, target_logit = state.parts, state.target_logit
    assert target_logit is not None
    # A difference of two infinities would be NaN.
    local = parts[3].clamp(min=NO_REFERENCE.value)
    dist.all_reduce(parts[3], op=dist.ReduceOp.MAX, group=shard.group)
    step = (local - parts[3].clamp(min=NO_REFERENCE.value)) * bits
    power = torch.exp2(step)
    parts[2] = power * (parts[2] + step * parts[1])
    parts[1] *= power
    # NaN marks a target of another rank; a logit that is NaN makes the sums NaN.
    found = ~torch.isnan(target_logit)
    sums = torch.stack([parts[1], parts[2], torch.where(found, target_logit, 0), found.float()])
    dist.all_reduce(sums, group=shard.group)
    parts[1:3] = sums[:2]
    target_logit.copy_(torch.where(sums[3] > 0, sums[2], torch.nan))


def finish_rows(
    state: RowState,
    rows: Rows,
    head: LinearInputs,
    shard: VocabShard | None,
    temperature: float,
    asked: Asked,
    dh: Tensor | None = None,
    block: tuple[int, int] = (LINE_BLOCK, 1),
) -> tuple[RowStats, RowFactors | None]:
    """Statistics and factors after all columns of this rank; also writes `rows.weight`.

    `dh` [splits, N, D] of this rank's columns becomes dH in its first part, a `block` of it at a
    time, summed over the ranks.
    """
    logits = logit_factors(head, temperature)
    if shard is not None:
        combine_shards(state, shard, logits.bits)
    count, hidden_size = head.hidden.shape

    def new(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device=head.hidden.device)

    stats = RowStats(
        loss=new(),
        nll=new(),
        lse=new() if asked.stats else None,
        top1=new(torch.bool) if asked.stats else None,
        largest=new() if asked.stats else None,
        entropy=new() if asked.entropy else None,
    )
    factors = state.parts.new_empty(4, count) if asked.factors else None
    if count > 0:
        launch = _finish_launch(
            head.hidden.device,
            triton_rows.HeadSizes(hidden_size, *head.weight.stride()),
            triton_rows.FinishFactors(logits.nats, logits.bits, head.logit_scale, logits.cap),
            asked.confidence,
            head.logit_softcap is not None,
            1 if dh is None else dh.shape[0],
            block,
        )
        launch(
            triton_rows._finish_kernel,
            (cdiv(count, block[0]), 1, 1),
            state.parts,
            state.target_logit,
            rows.place,
            rows.weight,
            stats,
            factors,
            dh,
            state.local_target,
            head.weight,
            count,
        )
    if dh is not None and shard is not None:
        dist.all_reduce(dh[0], group=shard.group)
    if factors is None:
        return stats, None
    return stats, RowFactors(*factors.unbind(), state.local_target)


@functools.lru_cache(maxsize=256)
def _finish_launch(
    device: torch.device,
    sizes: triton_rows.HeadSizes,
    factors: triton_rows.FinishFactors,
    confidence: WeightTransform | None,
    has_cap: bool,
    splits: int,
    block: tuple[int, int],
) -> Launch:
    transform = confidence or NO_TRANSFORM
    return Launch(
        *(sizes, factors),
        triton_rows.Transform(transform.power, transform.floor, transform.threshold),
        HAS_POWER=transform.power != 1,
        CONFIDENCE=confidence is not None,
        HAS_CAP=has_cap,
        SPLITS=splits,
        BLOCK_N=block[0],
        BLOCK_D=block[1],
    )


def finish_dh(
    dh: Tensor,
    head: LinearInputs,
    plan: Plan,
    rows: Rows,
    local_target: Tensor,
    factor: Tensor,
    target_factor: Tensor,
    shard: VocabShard | None,
) -> None:
    """dH = factor · ΣE W + target_factor · W_y, in the first part of dh [splits, N, D]; summed over
    the ranks of a shard."""
    (splits, count, hidden_size), block = dh.shape, plan.row_block
    if count > 0:
        _finish_dh_launch(dh.device, head.weight.stride(), splits, block)(
            row_gradients._finish_dh_kernel,
            (cdiv(count, block[0]), cdiv(hidden_size, block[1]), 1),
            dh,
            head.weight,
            rows.place,
            local_target,
            factor,
            target_factor,
            count,
            hidden_size,
        )
    if shard is not None:
        dist.all_reduce(dh[0], group=shard.group)


@functools.lru_cache(maxsize=256)
def _finish_dh_launch(
    device: torch.device, head_strides: tuple[int, ...], splits: int, block: tuple[int, int]
) -> Launch:
    return Launch(*head_strides, SPLITS=splits, BLOCK_N=block[0], BLOCK_D=block[1])
