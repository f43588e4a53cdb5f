"""The pass over all logits that yields statistics and, unscaled, dH.

N rows of the caller, n of them count, D hidden, V vocabulary. A chunk of rows runs through all
chunks of columns before the next; then every row's log-sum-exp is known and dH is scaled.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton import knobs

from gift_kernels.linear_ce.triton.chunk import Chunk
from gift_kernels.linear_ce.triton.chunk_size import ALL, Plan, logit_factors
from gift_kernels.linear_ce.triton.kernels import rows as triton_rows
from gift_kernels.linear_ce.triton.kernels.logits import NO_REFERENCE
from gift_kernels.linear_ce.types import Head, VocabShard

LINE_BLOCK = 64 if knobs.runtime.interpret else 1024


class Rows(NamedTuple):
    """The rows that count: caller's row of each, place of each caller's row or −1, their number.

    What is past their number in `index` is 0, a row that exists.
    """

    index: Tensor  # [N] int32
    place: Tensor  # [N] int32
    count: Tensor  # [1] int32


class RowResult(NamedTuple):
    """Statistics of the rows that count in the caller's order, 0 elsewhere, and factors of dH."""

    nll: Tensor  # [N]
    lse: Tensor  # [N]
    entropy: Tensor  # [N]
    top1: Tensor  # [N] bool
    factor: Tensor  # [N] of the sum of E W
    target_factor: Tensor  # [N] of the target's row of the head
    ref: Tensor  # [N], and
    share: Tensor  # [N] that makes 2^(bits · (x − ref)) the probability
    local_target: Tensor  # [N] int32, as in RowState
    guide_nll: Tensor | None = None  # [N]


class KeptRows(NamedTuple):
    """The first rows that count, whose exponentials outlive the pass."""

    chunk: Chunk
    exponentials: list[Tensor]  # [rows, columns] of each chunk of columns
    references: Tensor  # [chunks of columns, rows]


class RowState(NamedTuple):
    """What is known of the rows that count, in their order, after some of the columns."""

    parts: Tensor  # [4, N] ref, S, S2, M: see kernels/rows.py
    target_logit: Tensor | None  # [N] as accumulated, NaN where not seen
    local_target: Tensor  # [N] int32, row of this head or −1


class Guide(NamedTuple):
    """A second head whose statistics are wanted of the same rows."""

    head: Head
    temperature: float
    state: RowState


class GuideSide(NamedTuple):
    """What a launch for two heads needs of the guide: buffers of one chunk, state of all rows."""

    chunk: Chunk
    state: RowState


def rows_that_count(target: Tensor, ignore_index: int, weight: Tensor | None = None) -> Rows:
    """Rows [N] that are not ignored and, given weights [N], whose weight is not 0."""
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


def row_pass(
    head: Head,
    target: Tensor,
    rows: Rows,
    plan: Plan,
    shard: VocabShard | None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    want_dh: bool = False,
    kept: KeptRows | None = None,
    guide: Head | None = None,
    guide_temperature: float = 1.0,
) -> tuple[RowResult, Tensor | None]:
    """Statistics of the rows that count and, if wanted, dH float32 [N, D], unscaled.

    With `kept` the exponentials of its rows are kept, dH of all others is left undefined, and it is
    the caller who finishes dH. With `guide` the guide's nll comes from the same launches.
    """
    count = head.hidden.shape[0]
    state = new_state(head)
    beside = Guide(guide, guide_temperature, new_state(guide)) if guide is not None else None
    # Made at its first use: for rows that are kept, after the guide's buffers are gone.
    dh = functools.cache(lambda: state.parts.new_empty(head.hidden.shape))
    first_rest = 0
    if kept is not None:
        sums = dh if want_dh else None
        _of_row_chunk(kept.chunk, target, rows, state, sums, 0, shard, beside, kept)
        first_rest = kept.chunk.rows
    exponentials = want_dh and kept is None
    most = plan.chunk if exponentials else plan.statistics
    if not exponentials and kept is None:
        most = most._replace(columns=ALL)
    chunk = Chunk(
        head,
        plan,
        count - first_rest,
        most,
        temperature=temperature,
        with_entropy=with_entropy,
        exponentials=exponentials,
    )
    sums = dh if exponentials else None
    for first_row in range(first_rest, count, chunk.rows):
        _of_row_chunk(chunk, target, rows, state, sums, first_row, shard, beside)
    found = finish_rows(state, rows, head, with_entropy, shard, temperature)
    if beside is not None:
        of_guide = finish_rows(beside.state, rows, guide, False, shard, guide_temperature)
        found = found._replace(guide_nll=of_guide.nll)
    if exponentials:
        factors = (found.factor, found.target_factor)
        finish_dh(dh(), head, plan, rows, state.local_target, *factors, shard)
    return found, dh() if want_dh else None


def new_state(head: Head) -> RowState:
    """The state of all rows before the first column."""
    count, device = head.hidden.shape[0], head.hidden.device
    parts = torch.zeros(4, count, dtype=torch.float32, device=device)
    parts[0] = NO_REFERENCE.value
    parts[3] = -torch.inf
    target_logit = torch.full((count,), torch.nan, dtype=torch.float32, device=device)
    return RowState(parts, target_logit, torch.empty(count, dtype=torch.int32, device=device))


def _of_row_chunk(
    chunk: Chunk,
    target: Tensor,
    rows: Rows,
    state: RowState,
    dh: Callable[[], Tensor] | None,
    first_row: int,
    shard: VocabShard | None,
    guide: Guide | None,
    kept: KeptRows | None = None,
) -> None:
    """All columns for the rows of a chunk; the guide's in the launch of the first ones."""
    chunk.gather(target, rows, state, first_row, shard, guess=chunk.exponentials)
    side = _side(guide, chunk) if guide is not None else None
    if side is not None:
        side.chunk.gather(target, rows, side.state, first_row, shard)
    for number, first_v in enumerate(range(0, chunk.vocab_size, chunk.columns)):
        if kept is not None:
            chunk.exp = kept.exponentials[number]
        chunk.logits(rows, state, first_row, first_v, side)
        if side is not None:
            side.chunk.merge(rows, side.state, None, first_row, 0)
            side = None
        sums = dh() if dh is not None else None
        chunk.merge(rows, state, sums, first_row, first_v)
        if sums is not None:
            chunk.add_to_dh(rows, sums, first_row, first_v)
        if kept is not None:
            kept.references[number] = state.parts[0, : kept.references.shape[1]]


def _side(guide: Guide, chunk: Chunk) -> GuideSide:
    """Buffers for the guide's rows of a chunk, and all of its columns at once."""
    head = guide.head
    most = (chunk.rows, ALL)
    options = {"temperature": guide.temperature, "exponentials": False}
    return GuideSide(Chunk(head, chunk.plan, head.hidden.shape[0], most, **options), guide.state)


def combine_shards(state: RowState, shard: VocabShard, bits: float) -> None:
    """Makes a state of this rank's columns that of the whole vocabulary, in place.

    References stay this rank's own, which its E has.
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
    # NaN marks a target of another rank; a logit that is NaN is seen through the sums.
    found = ~torch.isnan(target_logit)
    sums = torch.stack([parts[1], parts[2], torch.where(found, target_logit, 0), found.float()])
    dist.all_reduce(sums, group=shard.group)
    parts[1:3] = sums[:2]
    target_logit.copy_(torch.where(sums[3] > 0, sums[2], torch.nan))


def finish_rows(
    state: RowState,
    rows: Rows,
    head: Head,
    with_entropy: bool,
    shard: VocabShard | None,
    temperature: float,
) -> RowResult:
    """Statistics and factors once all columns of this rank are seen."""
    factors_of_logits = logit_factors(head, temperature)
    if shard is not None:
        combine_shards(state, shard, factors_of_logits.bits)
    count, device = state.parts.shape[1], state.parts.device
    stats = state.parts.new_zeros(3 if with_entropy else 2, count)
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
    entropy = stats[2].clone() if with_entropy else stats.new_empty(0)
    return RowResult(
        stats[0].clone(), stats[1].clone(), entropy, top1, *factors, state.local_target
    )


def finish_dh(
    dh: Tensor,
    head: Head,
    plan: Plan,
    rows: Rows,
    local_target: Tensor,
    factor: Tensor,
    target_factor: Tensor,
    shard: VocabShard | None,
) -> None:
    """Scales dH [N, D], adds the targets' terms, sums over the slices of the vocabulary."""
    (count, hidden_size), block = dh.shape, plan.row_block
    if count > 0:
        triton_rows._finish_dh_kernel[
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
