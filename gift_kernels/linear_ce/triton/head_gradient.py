"""Gradients of a trainable head, which need the probabilities of all rows for a chunk of columns.

    dW [C, D] = Σ_i w_i G_iv h_i        db [C] = Σ_i w_i G_iv        G = P − 1[v = y], times slopes

G needs the log-sum-exp, which is known after the pass over all columns. There are two ways:

- Kept: the pass stores E = 2^(x − ref) of all columns for as many rows as fit in the memory of dW
  itself (float32 [V, D] holds 16-bit [2 D, V]). `Chunk.add_to_dw` turns E into w G in registers
  before the product with the hidden states: three products in all. E of chunk c is stored where dW
  of chunk c − 1 will be, E of chunk 0 in a buffer of its own. dW is computed from the last chunk to
  the first, so each chunk of dW overwrites an E that is no longer needed.
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
    """Buffers for the gradients of a call with a trainable head, float32; None: not requested."""

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


def kept_rows(
    head: LinearInputs, plan: Plan, count: int, with_entropy: bool, dw: Tensor
) -> KeptRows | None:
    """Memory in dW [V, D] for E of as many rows as fit, or None if less than a tile fits."""
    most = head.hidden.shape[1] * (4 // head.hidden.element_size())
    most = min(most // plan.pad * plan.pad, plan.kept.rows)
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
