"""State of the valid tokens of a call: which they are, their running sums, their statistics.

N rows of the caller, n of them valid, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton import knobs

from gift_kernels.linear_ce.triton.chunk_size import Plan, logit_factors
from gift_kernels.linear_ce.triton.kernels import row_gradients
from gift_kernels.linear_ce.triton.kernels import rows as triton_rows
from gift_kernels.linear_ce.triton.kernels.logits import NO_REFERENCE
from gift_kernels.linear_ce.types import LinearInputs, VocabShard

LINE_BLOCK = 64 if knobs.runtime.interpret else 1024


class Rows(NamedTuple):
    """The valid tokens of a call: not ignored and, where weights are known, not of weight 0.

    Entries of `index` past their number are 0, a row that exists.
    """

    index: Tensor  # [N] int32, the caller's row of each valid token
    place: Tensor  # [N] int32, where each of the caller's rows is in `index`, or −1
    count: Tensor  # [1] int32, their number


class RowState(NamedTuple):
    """Running sums of valid tokens, in their order, after some of the columns."""

    parts: Tensor  # [4, N] ref, S, S2, M, as defined in kernels/rows.py
    target_logit: Tensor | None  # [N] as accumulated, NaN where not seen
    local_target: Tensor  # [N] int32, row of this head or −1


class RowResult(NamedTuple):
    """Statistics of valid tokens in the caller's order, 0 on other rows; and factors of dH.

    dH = factor · Σ E W + target_factor · W_y, and share · 2^(bits · (x − ref)) is a probability.
    """

    nll: Tensor  # [N]
    lse: Tensor  # [N]
    entropy: Tensor  # [N]
    top1: Tensor  # [N] bool
    largest: Tensor  # [N]
    factor: Tensor  # [N]
    target_factor: Tensor  # [N]
    ref: Tensor  # [N]
    share: Tensor  # [N]
    local_target: Tensor  # [N] int32, as in RowState
    guide_nll: Tensor | None = None  # [N]


def valid_tokens(target: Tensor, ignore_index: int, weight: Tensor | None = None) -> Rows:
    """Finds the rows [N] that are not ignored and, given weights [N], whose weight is not 0.

    Their number stays on the device: nothing waits for it.
    """
    count = target.shape[0]
    rows = Rows(
        index=torch.zeros(count, dtype=torch.int32, device=target.device),
        place=torch.empty(count, dtype=torch.int32, device=target.device),
        count=torch.empty(1, dtype=torch.int32, device=target.device),
    )
    triton_rows._compact_kernel[(1,)](
        target,
        target if weight is None else weight.contiguous(),
        *rows,
        count,
        ignore_index,
        HAS_WEIGHT=weight is not None,
        BLOCK=LINE_BLOCK,
    )
    return rows


def new_state(head: LinearInputs) -> RowState:
    """The state of all rows before the first column."""
    count, device = head.hidden.shape[0], head.hidden.device
    parts = torch.zeros(4, count, dtype=torch.float32, device=device)
    parts[0] = NO_REFERENCE.value
    parts[3] = -torch.inf
    target_logit = torch.full((count,), torch.nan, dtype=torch.float32, device=device)
    return RowState(parts, target_logit, torch.empty(count, dtype=torch.int32, device=device))


def combine_shards(state: RowState, shard: VocabShard, bits: float) -> None:
    """All-reduces the sums of this rank's columns to those of the whole vocabulary, in place.

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
    with_entropy: bool,
    shard: VocabShard | None,
    temperature: float,
) -> RowResult:
    """Statistics and factors once all columns of this rank are seen."""
    factors_of_logits = logit_factors(head, temperature)
    if shard is not None:
        combine_shards(state, shard, factors_of_logits.bits)
    count, device = state.parts.shape[1], state.parts.device
    stats = state.parts.new_zeros(4 if with_entropy else 3, count)
    top1 = torch.zeros(count, dtype=torch.bool, device=device)
    factors = state.parts.new_zeros(4, count)
    if count > 0:
        triton_rows._finish_kernel[(triton.cdiv(count, LINE_BLOCK),)](
            state.parts,
            state.target_logit,
            rows.index,
            rows.count,
            stats,
            top1,
            factors,
            count,
            factors_of_logits.nats,
            factors_of_logits.bits,
            head.logit_scale,
            factors_of_logits.cap,
            HAS_CAP=head.logit_softcap is not None,
            ENTROPY=with_entropy,
            BLOCK_N=LINE_BLOCK,
        )
    nll, lse, largest = (row.clone() for row in stats[:3])
    entropy = stats[3].clone() if with_entropy else stats.new_empty(0)
    return RowResult(nll, lse, entropy, top1, largest, *factors, state.local_target)


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
    """dH = factor · dH + target_factor · W_y in place, summed over the ranks of a shard."""
    (count, hidden_size), block = dh.shape, plan.row_block
    if count > 0:
        row_gradients._finish_dh_kernel[
            (triton.cdiv(count, block[0]), triton.cdiv(hidden_size, block[1]))
        ](
            dh,
            head.weight,
            rows.place,
            local_target,
            factor,
            target_factor,
            count,
            hidden_size,
            *head.weight.stride(),
            BLOCK_N=block[0],
            BLOCK_D=block[1],
        )
    if shard is not None:
        dist.all_reduce(dh, group=shard.group)
