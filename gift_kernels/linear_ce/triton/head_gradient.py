"""Gradients of a trainable head, which need the probabilities of all rows for a chunk of columns.

    dW [C, D] = Σ_i w_i G_iv h_i        db [C] = Σ_i w_i G_iv        G = P − 1[v = y], times slopes

G needs the log-sum-exp, which is known after the pass over all columns. There are two ways:

- Kept: the pass stores E = 2^(x − ref) of all columns for as many rows as fit in the memory of dW
  itself (float32 [V, D] holds 16-bit [2 D, V]). `Chunk.add_to_dw` turns E into w G in registers
  before the product with the hidden states: three products in all.
  If these are all rows and autograd can save E, dW is left to the backward (`Deferred`), where the
  upstream gradient is known: dW is stored once, scaled and in the dtype of the head.
  Otherwise it is computed in the forward. E of chunk c is stored where dW of chunk c − 1 will be,
  E of chunk 0 in a buffer of its own. dW is computed from the last chunk to the first, so each
  chunk of dW overwrites an E that is no longer needed.
- Recomputed: logits of all other rows are computed a second time, with the final references: four
  products.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gift_kernels.linear_ce.triton.chunk import Chunk, KeptRows
from gift_kernels.linear_ce.triton.chunk_size import MARGIN, Plan, logit_factors
from gift_kernels.linear_ce.triton.kernels.matmul import RowWeights
from gift_kernels.linear_ce.triton.row_state import RowFactors, Rows, RowState
from gift_kernels.linear_ce.types import LinearInputs, VocabShard


class WeightsInOrder(NamedTuple):
    """Weights of valid tokens, in their order, divided by a common factor."""

    is_zero: Tensor  # [N] bool, taken before the division by `scale`, which may underflow
    weight: Tensor  # [N]
    target_factor: Tensor  # [N] the weighted gradient of the target's logit
    ref: Tensor  # [N]
    share: Tensor  # [N]
    scale: Tensor  # [1]


class Gradients(NamedTuple):
    """Buffers for the gradients of a call with a trainable head; None: not requested.

    float32, except that dW has the head's dtype where one product computes all of it.
    """

    dh: Tensor | None  # [splits, N, D] of each row's nll, without weights; their sum at the end [0]
    dw: Tensor | None  # [V, D] of the weighted sum
    db: Tensor | None  # [V] so too


def with_room_above(found: RowFactors, head: LinearInputs) -> RowFactors:
    """References for recomputed rows: their largest logits, lowered for float16's range."""
    bits = logit_factors(head).bits
    ref = found.ref - MARGIN[head.hidden.dtype][1] / bits
    return found._replace(ref=ref, share=found.share * torch.exp2((ref - found.ref) * bits))


def weights_in_order(
    head: LinearInputs, rows: Rows, found: RowFactors, weight: Tensor
) -> WeightsInOrder:
    """The weights [N], from the caller's order to that of valid tokens."""
    scale = torch.ones(1, dtype=torch.float32, device=weight.device)
    if head.hidden.dtype == torch.float16 and weight.numel() > 0:
        # float16 ends at 65504, and a loss scale cannot restore underflow: weights are scaled so
        # that the largest becomes 2^14.
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


def most_kept(head: LinearInputs, plan: Plan) -> int:
    """How many rows have an E [rows, V] of at most the size of dW [V, D] in float32; may be 0.

    The columns of its last chunk may be more than those that are left.
    """
    most = head.hidden.shape[1] * (4 // head.hidden.element_size())
    return min(most // plan.pad * plan.pad, plan.kept.rows)


def kept_rows(
    head: LinearInputs, plan: Plan, count: int, with_entropy: bool, dw: Tensor | None
) -> KeptRows | None:
    """As many rows as may be kept, or None; their E in the memory of dW, or without dW its own."""
    most, vocab_size = most_kept(head, plan), head.weight.shape[0]
    if count == 0 or most == 0:
        return None
    chunk = Chunk(head, plan, count, (most, plan.kept.columns), with_entropy=with_entropy)
    rows, columns = chunk.exp.shape
    chunks = triton.cdiv(vocab_size, columns)
    if dw is None:
        step = rows * columns
        memory = chunk.exp.new_empty((chunks - 1) * step)
    else:
        memory = dw.view(-1).view(chunk.dtype)
        step = columns * memory.numel() // vocab_size  # of one chunk's dW
    exponentials = [chunk.exp]
    for number in range(1, chunks):
        start = (number - 1) * step
        exponentials.append(memory[start : start + rows * columns].view(rows, columns))
    options = {"dtype": torch.float32, "device": chunk.exp.device}
    references = torch.empty(chunks, min(rows, count), **options)
    return KeptRows(chunk, exponentials, references)


class Deferred(NamedTuple):
    """What dW and db of all rows are made of, once the upstream gradient is known."""

    plan: Plan
    tensors: list[Tensor]  # hidden states of a chunk, references, `Rows`, `RowFactors`, and E


def deferred(kept: KeptRows, rows: Rows, found: RowFactors) -> Deferred:
    """All that `deferred_gradients` reads, as tensors that autograd can keep."""
    tensors = [kept.chunk.hidden, kept.references, *rows, *found, *kept.exponentials]
    return Deferred(kept.chunk.plan, tensors)


def deferred_gradients(
    head: LinearInputs, found: Deferred, upstream: Tensor, *, want_db: bool
) -> Gradients:
    """dW, rounded once to the dtype of the head, and db of upstream [] times the weighted sum.

    dW is written to `head.weight`; no value of `head` is read. What is kept stays as it is.
    """
    hidden, references, *others = found.tensors
    rows, others = Rows(*others[: len(Rows._fields)]), others[len(Rows._fields) :]
    factors = with_room_above(RowFactors(*others[: len(RowFactors._fields)]), head)
    exponentials = others[len(RowFactors._fields) :]
    head = head._replace(hidden=hidden)
    shape = exponentials[0].shape
    chunk = Chunk(head, found.plan, shape[0], tuple(shape), final=True, exp=exponentials[0])
    chunk.hidden.copy_(hidden)
    db = head.weight.new_empty(head.weight.shape[0], dtype=torch.float32) if want_db else None
    into = Gradients(None, head.weight, db)
    # An upstream gradient of 0 gives 0 whatever the sum is.
    order = weights_in_order(head, rows, factors, torch.where(upstream == 0, 0, rows.weight))
    order = order._replace(scale=order.scale * upstream)
    add_kept_rows(KeptRows(chunk, exponentials, references), rows, factors, order, into)
    return into


def add_kept_rows(
    kept: KeptRows,
    rows: Rows,
    found: RowFactors,
    order: WeightsInOrder,
    into: Gradients,
) -> None:
    """Adds to dW and db for the rows whose exponentials were kept."""
    chunk, count = kept.chunk, kept.references.shape[1]
    powers = torch.exp2((kept.references - order.ref[:count]) * chunk.factors.bits)
    powers *= order.share[:count]
    # 0 · NaN is NaN: rows of weight 0 get a factor of exactly 0.
    factors = order.weight[:count] * chunk.head.logit_scale * powers
    factors = torch.where(order.is_zero[:count], 0, factors)
    _zero_hidden_of_weight_0(chunk, order, 0)
    for number in reversed(range(len(kept.exponentials))):
        chunk.exp = kept.exponentials[number]
        _add_columns(chunk, rows, found, factors[number], order, into, 0, number * chunk.columns)


def add_rows_again(
    chunk: Chunk,
    target: Tensor,
    rows: Rows,
    found: RowFactors,
    order: WeightsInOrder,
    into: Gradients,
    first_row: int,
    shard: VocabShard | None,
) -> None:
    """Adds to dH, dW and db for a chunk of rows, whose logits are computed a second time."""
    state = RowState(order.ref.unsqueeze(0), None, found.local_target)
    factor = order.weight * chunk.head.logit_scale * order.share
    factor = torch.where(order.is_zero, 0, factor)[first_row:]
    chunk.gather(target, rows, state, first_row, shard)
    _zero_hidden_of_weight_0(chunk, order, first_row)
    for first_v in range(0, chunk.vocab_size, chunk.columns):
        chunk.logits(rows, state, first_row, first_v)
        if into.dh is not None:
            chunk.add_to_dh(rows, into.dh, first_row, first_v)
        _add_columns(chunk, rows, found, factor, order, into, first_row, first_v)


def _add_columns(
    chunk: Chunk,
    rows: Rows,
    found: RowFactors,
    factor: Tensor,
    order: WeightsInOrder,
    into: Gradients,
    first_row: int,
    first_v: int,
) -> None:
    """Adds the products of dlogits of the weighted sum for a chunk."""
    target_factor, target = order.target_factor[first_row:], found.local_target[first_row:]
    weights = RowWeights(factor, target_factor, target)
    if into.dw is not None:
        chunk.add_to_dw(rows, weights, into.dw, order.scale, first_row, first_v)
    if into.db is not None:
        chunk.add_to_db(rows, weights, into.db, order.scale, first_row, first_v)


def _zero_hidden_of_weight_0(chunk: Chunk, order: WeightsInOrder, first_row: int) -> None:
    """0 · NaN is NaN: hidden states of rows of weight 0 must not reach dW."""
    is_zero = order.is_zero[first_row : first_row + chunk.rows]
    chunk.hidden[: is_zero.shape[0]].masked_fill_(is_zero.unsqueeze(1), 0)
