"""Gradients of a trainable head, which need the probabilities of all rows for a chunk of columns.

    dW [C, D] = Σ_i w_i G_iv h_i        db [C] = Σ_i w_i G_iv        G = P − 1[v = y], times slopes

G needs the log-sum-exp, which is known after the pass over all columns. There are two ways:

- Kept: the pass stores E = 2^(x − ref) of all columns, for as many rows as take no more memory than
  dW of more rows would: 3 D in bfloat16 (see `most_kept_rows`). `Chunk.weigh` writes the targets'
  entries into E, and `Chunk.add_to_dw` multiplies it by the weighted hidden states: three products
  in all. E lies in dW as far as it fits. dW is computed from the last chunk of columns to the
  first, so each chunk of dW overwrites an E that is no longer needed.
- Again: logits of all other rows are computed a second time, with the final references: four
  products.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gift_kernels.linear_ce.triton.chunk import Chunk, KeptRows
from gift_kernels.linear_ce.triton.chunk_size import MARGIN, Plan, logit_factors, most_kept_rows
from gift_kernels.linear_ce.triton.row_state import RowResult, Rows, RowState
from gift_kernels.linear_ce.types import LinearInputs, VocabShard, dw_dtype


class WeightsInOrder(NamedTuple):
    """Weights of valid tokens, in their order, and a common factor taken out of them."""

    is_zero: Tensor  # [N] bool, taken before the division by `scale`, which may underflow
    weight: Tensor  # [N]
    target_factor: Tensor  # [N] the weighted gradient of the target's logit
    ref: Tensor  # [N]
    share: Tensor  # [N]
    scale: Tensor  # [1]


class Gradients(NamedTuple):
    """Where the gradients of a trainable head's call are summed, float32; None: not wanted."""

    dh: Tensor | None  # [N, D] of each row's nll, without weights
    dw: Tensor | None  # [V, D] of the weighted sum; rounded at once where it is written once
    db: Tensor | None  # [V] so too


def with_room_above(found: RowResult, head: LinearInputs) -> RowResult:
    """References of rows multiplied again are their largest logits; float16 needs room above."""
    bits = logit_factors(head).bits
    ref = found.ref - MARGIN[head.hidden.dtype][1] / bits
    return found._replace(ref=ref, share=found.share * torch.exp2((ref - found.ref) * bits))


def weights_in_order(
    head: LinearInputs, rows: Rows, found: RowResult, weight: Tensor
) -> WeightsInOrder:
    """The weights [N], from the caller's order to that of valid tokens."""
    scale = torch.ones(1, dtype=torch.float32, device=weight.device)
    if head.hidden.dtype == torch.float16 and weight.numel() > 0:
        # float16 ends at 65504, and no loss scale restores what is lost at its lower end: weights
        # enter E so that the largest becomes 2^14.
        largest = weight.abs().amax() * max(1.0, head.logit_scale)
        usable = (largest > 0) & torch.isfinite(largest)
        scale = torch.where(usable, largest / 2**14, 1).reshape(1)
    index = rows.index.long()
    return WeightsInOrder(
        weight[index] == 0,
        (weight / scale)[index],
        torch.where(weight == 0, 0, weight * found.target_factor / scale)[index],
        found.ref[index],
        found.share[index],
        scale,
    )


def new_dw(head: LinearInputs, plan: Plan, count: int) -> Tensor:
    """dW [V, D], float32 where rows are added later: those kept write it once."""
    dtype = torch.float32
    if count <= _most_kept(head, plan):
        dtype = dw_dtype(head.hidden.dtype, "triton")
    new = torch.zeros if count == 0 else torch.empty
    return new(*head.weight.shape, dtype=dtype, device=head.hidden.device)


def _most_kept(head: LinearInputs, plan: Plan) -> int:
    most = most_kept_rows(head.hidden.shape[1], head.hidden.dtype)
    return min(most // plan.pad * plan.pad, plan.kept.rows)


def kept_rows(
    head: LinearInputs, plan: Plan, count: int, with_entropy: bool, dw: Tensor
) -> KeptRows | None:
    """Buffers for E of the first rows, or None if those are fewer than a tile.

    E lies in dW [V, D] as far as it fits, from the last chunk on, each below what is written of dW
    before it is read: below its own chunk of dW and E of the next chunk.
    """
    most = _most_kept(head, plan)
    if count == 0 or most == 0:
        return None
    chunk = Chunk(head, plan, count, (most, plan.kept.columns), with_entropy=with_entropy)
    memory = dw.view(-1).view(chunk.dtype)
    shape = chunk.exp.shape
    size, of_chunk = shape.numel(), chunk.columns * memory.numel() // dw.shape[0]
    exponentials = [chunk.exp]
    free = memory.numel()
    for number in reversed(range(1, triton.cdiv(dw.shape[0], chunk.columns))):
        free = min(free, number * of_chunk) - size
        place = memory[free : free + size].view(shape) if free >= 0 else chunk.exp.new_empty(shape)
        exponentials.insert(1, place)
    references = dw.new_empty(len(exponentials), min(chunk.rows, count), dtype=torch.float32)
    return KeptRows(chunk, exponentials, references)


def add_kept_rows(
    kept: KeptRows,
    rows: Rows,
    found: RowResult,
    order: WeightsInOrder,
    into: Gradients,
) -> None:
    """Adds to dW and db for the rows whose exponentials were kept.

    A row's factor multiplies its hidden states, once for all chunks of columns, so that E is left
    as it was stored but for rows whose reference has changed since. In float16, which has no room
    for factors beside hidden states, it multiplies E.
    """
    chunk, count = kept.chunk, kept.references.shape[1]
    is_zero = order.is_zero[:count]
    of_row = order.weight[:count] * chunk.head.logit_scale * order.share[:count]
    of_row = torch.where(is_zero, 0, of_row)
    powers = torch.exp2((kept.references - order.ref[:count]) * chunk.factors.bits)
    if chunk.dtype == torch.float16:
        powers, of_row = powers * of_row, None
    _weigh_hidden(chunk, order, 0, of_row)
    target_entry = order.target_factor[:count]
    if of_row is not None:
        target_entry = torch.where(of_row == 0, 0, target_entry / of_row)
    # 0 · NaN is NaN: rows of weight 0 get a factor of exactly 0.
    powers = torch.where(is_zero, 0, powers)
    for number in reversed(range(len(kept.exponentials))):
        chunk.exp = kept.exponentials[number]
        first_v = number * chunk.columns
        chunk.weigh(rows, found.local_target, powers[number], target_entry, 0, first_v)
        _add_columns(chunk, rows, of_row, order, into, 0, first_v)


def add_rows_again(
    chunk: Chunk,
    target: Tensor,
    rows: Rows,
    found: RowResult,
    order: WeightsInOrder,
    into: Gradients,
    first_row: int,
    shard: VocabShard | None,
) -> None:
    """Adds to dH, dW and db for a chunk of rows, whose logits are computed a second time."""
    state = RowState(order.ref.unsqueeze(0), None, found.local_target)
    factor = order.weight * chunk.head.logit_scale * order.share
    factor = torch.where(order.is_zero, 0, factor)[first_row:]
    target_entry = order.target_factor[first_row:]
    chunk.gather(target, rows, state, first_row, shard)
    _weigh_hidden(chunk, order, first_row, None)
    for first_v in range(0, chunk.vocab_size, chunk.columns):
        chunk.logits(rows, state, first_row, first_v)
        if into.dh is not None:
            chunk.add_to_dh(rows, into.dh, first_row, first_v)
        chunk.weigh(rows, found.local_target, factor, target_entry, first_row, first_v)
        _add_columns(chunk, rows, None, order, into, first_row, first_v)


def _add_columns(
    chunk: Chunk,
    rows: Rows,
    of_row: Tensor | None,
    order: WeightsInOrder,
    into: Gradients,
    first_row: int,
    first_v: int,
) -> None:
    """Multiplies dlogits by the hidden states; `of_row` [rows] is what these hold of a factor."""
    if into.dw is not None:
        chunk.add_to_dw(rows, into.dw, order.scale, first_row, first_v)
    if into.db is not None:
        chunk.add_to_db(rows, of_row, into.db, order.scale, first_row, first_v)


def _weigh_hidden(
    chunk: Chunk, order: WeightsInOrder, first_row: int, of_row: Tensor | None
) -> None:
    """Multiplies a chunk's hidden states by `of_row` [rows]; zeroes those of rows of weight 0.

    0 · NaN is NaN: they must not reach dW.
    """
    is_zero = order.is_zero[first_row : first_row + chunk.rows]
    hidden = chunk.hidden[: is_zero.shape[0]]
    if of_row is not None:
        hidden.mul_(of_row.unsqueeze(1))
    hidden.masked_fill_(is_zero.unsqueeze(1), 0)
