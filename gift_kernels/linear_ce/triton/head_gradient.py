"""Gradients of a trainable head, which need the probabilities of all rows for a chunk of columns.

    dW [C, D] = Σ_i w_i G_iv h_i        db [C] = Σ_i w_i G_iv        G = P − 1[v = y], times slopes

G needs the log-sum-exp, known after the pass over all columns. Two ways:

- Kept: the pass stores E = 2^(x − ref) of all columns for as many rows as fit in the memory of dW
  itself (float32 [V, D] holds 16-bit [2 D, V]), and brings it to w G when dW is made: three units
  in all. E of chunk c lies where dW of chunk c − 1 will be, E of chunk 0 in a buffer of its own; dW
  is made from the last chunk to the first, so that what it overwrites has just been used.
- Again: rows beyond that are multiplied a second time, from the final references. Four units.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gift_kernels.linear_ce.triton.chunk import Chunk
from gift_kernels.linear_ce.triton.chunk_size import MARGIN, Plan, logit_factors
from gift_kernels.linear_ce.triton.row_pass import (
    KeptRows,
    RowResult,
    Rows,
    RowState,
    finish_dh,
    row_pass,
)
from gift_kernels.linear_ce.types import Head, VocabShard


class HeadResult(NamedTuple):
    """Statistics, the weights [N] that entered dW and db, and the gradients that were wanted."""

    found: RowResult
    weight: Tensor
    dh: Tensor | None  # [N, D] unscaled
    dw: Tensor | None  # [V, D]
    db: Tensor | None  # [V]


def head_gradients(
    head: Head,
    target: Tensor,
    rows: Rows,
    plan: Plan,
    shard: VocabShard | None,
    weigh: Callable[[RowResult], Tensor],
    *,
    with_entropy: bool = False,
    want_dh: bool = False,
    want_dw: bool = False,
    want_db: bool = False,
    guide: Head | None = None,
    guide_temperature: float = 1.0,
) -> HeadResult:
    """Statistics and gradients; `weigh` makes the weights [N] of the statistics."""
    (count, hidden_size), (vocab_size, _) = head.hidden.shape, head.weight.shape
    new = torch.zeros if count == 0 else torch.empty
    options: dict[str, Any] = {"dtype": torch.float32, "device": head.hidden.device}
    dw = new(vocab_size, hidden_size, **options) if want_dw else None
    db = new(vocab_size, **options) if want_db else None
    kept = kept_rows(head, plan, count, with_entropy, dw) if dw is not None else None
    found, dh = row_pass(
        head,
        target,
        rows,
        plan,
        shard,
        with_entropy=with_entropy,
        want_dh=want_dh and kept is not None,
        kept=kept,
        guide=guide,
        guide_temperature=guide_temperature,
    )
    if want_dh and dh is None:
        dh = torch.empty(count, hidden_size, **options)
    weight = weigh(found)
    scale = torch.ones(1, **options)
    if head.hidden.dtype == torch.float16 and count > 0:
        # float16 ends at 65504, and what it loses at its lower end no later loss scale brings back:
        # weights enter E so that the largest becomes 2^14.
        largest = weight.abs().amax() * max(1.0, head.logit_scale)
        usable = (largest > 0) & torch.isfinite(largest)
        scale = torch.where(usable, largest / 2**14, 1).reshape(1)
    # References of rows that are multiplied again are their largest logits: float16 has room above.
    bits = logit_factors(head).bits
    ref = found.ref - MARGIN[head.hidden.dtype][1] / bits
    share = found.share * torch.exp2((ref - found.ref) * bits)
    index = rows.index.long()
    order = _WeightsInOrder(
        weight[index] == 0,
        (weight / scale)[index],
        torch.where(weight == 0, 0, weight * found.target_factor / scale)[index],
        ref[index],
        share[index],
        scale,
    )
    first_rest = 0
    if kept is not None:
        _of_kept_rows(kept, rows, found, order, dw, db)
        first_rest = kept.chunk.rows
        kept = None  # and its buffers
    if first_rest < count:
        chunk = Chunk(head, plan, count - first_rest, plan.again, final=True)
        for first_row in range(first_rest, count, chunk.rows):
            _of_rows_again(chunk, target, rows, found, order, dh, dw, db, first_row, shard)
    if dh is not None:
        factors = torch.where(rows.place < first_rest, found.factor, head.logit_scale * share)
        finish_dh(dh, head, plan, rows, found.local_target, factors, found.target_factor, shard)
    return HeadResult(found, weight, dh, dw, db)


class _WeightsInOrder(NamedTuple):
    """Of the rows that count, in their order; and a common factor taken out of the weights."""

    is_zero: Tensor  # [N] bool; a small weight may become 0 where the factor is taken out
    weight: Tensor  # [N]
    target_factor: Tensor  # [N] the weighted gradient of the target's logit
    ref: Tensor  # [N]
    share: Tensor  # [N]
    scale: Tensor  # [1]


def kept_rows(
    head: Head, plan: Plan, count: int, with_entropy: bool, dw: Tensor
) -> KeptRows | None:
    """As many rows as dW [V, D] can keep E of, or None if that is less than a tile."""
    most = head.hidden.shape[1] * (4 // head.hidden.element_size())
    pad = plan.pad
    most = min(most // pad * pad, plan.kept.rows)
    if count == 0 or most == 0:
        return None
    chunk = Chunk(head, plan, count, (most, plan.kept.columns), with_entropy=with_entropy)
    memory = dw.view(-1).view(chunk.dtype)
    rows, columns = chunk.exp.shape
    exponentials = [chunk.exp]
    step = columns * memory.numel() // dw.shape[0]  # of one chunk's dW
    for number in range(1, triton.cdiv(dw.shape[0], columns)):
        start = (number - 1) * step
        exponentials.append(memory[start : start + rows * columns].view(rows, columns))
    references = dw.new_empty(len(exponentials), min(rows, count))
    return KeptRows(chunk, exponentials, references)


def _of_kept_rows(
    kept: KeptRows,
    rows: Rows,
    found: RowResult,
    order: _WeightsInOrder,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    chunk, count = kept.chunk, kept.references.shape[1]
    powers = torch.exp2((kept.references - order.ref[:count]) * chunk.factors.bits)
    powers *= order.share[:count]
    # 0 · NaN is NaN, here too.
    factors = order.weight[:count] * chunk.head.logit_scale * powers
    factors = torch.where(order.is_zero[:count], 0, factors)
    _shut_out_zero_rows(chunk, order, 0)
    for number in reversed(range(len(kept.exponentials))):
        chunk.exp = kept.exponentials[number]
        _add_columns(chunk, rows, found, factors[number], order, dw, db, 0, number * chunk.columns)


def _of_rows_again(
    chunk: Chunk,
    target: Tensor,
    rows: Rows,
    found: RowResult,
    order: _WeightsInOrder,
    dh: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    first_row: int,
    shard: VocabShard | None,
) -> None:
    state = RowState(order.ref.unsqueeze(0), None, found.local_target)
    factor = order.weight * chunk.head.logit_scale * order.share
    factor = torch.where(order.is_zero, 0, factor)[first_row:]
    chunk.gather(target, rows, state, first_row, shard)
    _shut_out_zero_rows(chunk, order, first_row)
    for first_v in range(0, chunk.vocab_size, chunk.columns):
        chunk.logits(rows, state, first_row, first_v)
        if dh is not None:
            chunk.add_to_dh(rows, dh, first_row, first_v)
        _add_columns(chunk, rows, found, factor, order, dw, db, first_row, first_v)


def _add_columns(
    chunk: Chunk,
    rows: Rows,
    found: RowResult,
    factor: Tensor,
    order: _WeightsInOrder,
    dw: Tensor | None,
    db: Tensor | None,
    first_row: int,
    first_v: int,
) -> None:
    target_factor = order.target_factor[first_row:]
    chunk.weigh(rows, found.local_target, factor, target_factor, first_row, first_v)
    if dw is not None:
        chunk.add_to_dw(rows, dw, order.scale, first_row, first_v)
    if db is not None:
        chunk.add_to_db(rows, db, order.scale, first_row, first_v)


def _shut_out_zero_rows(chunk: Chunk, order: _WeightsInOrder, first_row: int) -> None:
    """0 · NaN is NaN: hidden states of rows of weight 0 must not reach dW."""
    is_zero = order.is_zero[first_row : first_row + chunk.rows]
    chunk.hidden[: is_zero.shape[0]].masked_fill_(is_zero.unsqueeze(1), 0)
