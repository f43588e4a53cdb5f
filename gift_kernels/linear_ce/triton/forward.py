"""Linear cross-entropy in Triton: `solve` and `solve_head_gradient` as in `eager`.

From a row's weight to its gradient:

1. `valid_tokens` lists the rows that are not ignored, and not of weight 0 where weights are given.
2. `row_pass` runs over all logits once. Per chunk of rows, per chunk of C columns: `Chunk.logits`
   stores E = 2^(x − ref) and partial sums, `Chunk.merge` adds the sums to the rows' state,
   `Chunk.add_to_dh` adds E W to dH.
3. `finish_rows` makes nll and two factors of the state; `finish_dh` then makes the gradient of each
   row's nll: dH = factor · ΣE W + target_factor · W_y. No weight has entered yet.
4. `weigh` in `solve` makes the weights of the statistics, the guide's confidence or the argument.
5. dH: the operator's backward multiplies row i by its weight and its upstream gradient
   (`scaled_rows`). dW and db: `head_gradients` multiplies E by the weights and the hidden states
   (`Chunk.add_to_dw`); see `head_gradient`.

Statistics alone are step 2 without E. A trainable head costs three products for rows whose E is
kept until the weights are known, and where only dW is wanted; four for all other rows.

A guide's tiles run in the launches of the model's first chunk of columns. With a threshold the
guide runs first instead, so that rows below it are left out of the model's products.

Nothing waits for the device: the number of valid tokens is computed and read there, and launches
cover the case that all N are valid. Memory: dH float32 [N, D], which the caller gets; E and the
gathered rows of one chunk (see `chunk_size`); the partial sums. None grows with N V.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from gift_kernels.linear_ce.triton.chunk import Chunk, GuideSide, KeptRows
from gift_kernels.linear_ce.triton.chunk_size import (
    ALL,
    INTERPRETER_ROW_BLOCK,
    ROW_BLOCK,
    Plan,
    default_plan,
)
from gift_kernels.linear_ce.triton.head_gradient import (
    Gradients,
    add_kept_rows,
    add_rows_again,
    kept_rows,
    weights_in_order,
    with_room_above,
)
from gift_kernels.linear_ce.triton.kernels import row_gradients
from gift_kernels.linear_ce.triton.row_state import (
    RowResult,
    Rows,
    RowState,
    finish_dh,
    finish_rows,
    new_state,
    valid_tokens,
)
from gift_kernels.linear_ce.types import LinearCE, LinearInputs, Problem, VocabShard
from gift_kernels.reference import transform_weight


class Guide(NamedTuple):
    """A second head whose statistics are wanted of the same rows."""

    head: LinearInputs
    temperature: float


def solve(problem: Problem, plan: Plan | None = None) -> LinearCE:
    """Computes one call of the operator on its valid tokens."""
    problem = contiguous(problem)
    head, target = problem.head, problem.target
    check_dtype(head.hidden)
    grad = problem.want_dh or problem.want_dw or problem.want_db
    want_dw = problem.want_dw and not problem.rowwise
    want_db = problem.want_db and not problem.rowwise
    valid = target != problem.ignore_index
    rows = valid_tokens(target, problem.ignore_index)
    weight = valid.float()
    together = problem.guide if shares_launches(problem) else None
    plan = plan or default_plan(head, together, with_entropy=problem.with_entropy)

    def confidence(nll: Tensor) -> Tensor:
        return torch.where(valid, transform_weight(torch.exp(-nll), problem.transform), 0)

    def weigh(found: RowResult) -> Tensor:
        if found.guide_nll is not None:
            return confidence(found.guide_nll)
        return confidence(found.nll) if problem.self_weight else weight

    if problem.guide is not None and together is None:
        first = (problem.guide, target, rows, default_plan(problem.guide), problem.shard)
        found, _ = row_pass(*first, temperature=problem.temperature)
        weight = confidence(found.nll)
    elif problem.row_weight is not None:
        weight = torch.where(valid, problem.row_weight.float(), 0)
    weighted = problem.guide is not None or problem.row_weight is not None
    if weighted and together is None and not problem.keep_zero_rows:
        rows = valid_tokens(target, problem.ignore_index, weight)
    options: dict[str, Any] = {
        "with_entropy": problem.with_entropy,
        "want_dh": problem.want_dh,
        "guide": None if together is None else Guide(together, problem.temperature),
    }
    call = (head, target, rows, plan, problem.shard)
    if want_dw or want_db:
        options |= {"want_dw": want_dw, "want_db": want_db}
        found, weight, (dh, dw, db) = head_gradients(*call, weigh, **options)
    else:
        own = 1.0 if grad or problem.guide is not None else problem.temperature
        found, dh = row_pass(*call, temperature=own, **options)
        weight, dw, db = weigh(found), None, None
    empty = weight.new_empty(0)
    return LinearCE(
        total=torch.where(weight == 0, 0, weight * found.nll).sum(),
        nll=found.nll,
        lse=found.lse,
        entropy=found.entropy,
        top1=found.top1,
        weight=weight,
        dh=dh if dh is not None else empty,
        dw=dw if dw is not None else empty.clone(),
        db=db if db is not None else empty.clone(),
    )


def head_gradients(
    head: LinearInputs,
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
    guide: Guide | None = None,
) -> tuple[RowResult, Tensor, Gradients]:
    """Statistics, the weights [N] that `weigh` makes of them, and the gradients."""
    (count, hidden_size), (vocab_size, _) = head.hidden.shape, head.weight.shape
    new = torch.zeros if count == 0 else torch.empty
    options: dict[str, Any] = {"dtype": torch.float32, "device": head.hidden.device}
    dw = new(vocab_size, hidden_size, **options) if want_dw else None
    db = new(vocab_size, **options) if want_db else None
    kept = kept_rows(head, plan, count, with_entropy, dw) if dw is not None else None
    pass_options: dict[str, Any] = {"with_entropy": with_entropy, "kept": kept, "guide": guide}
    pass_options |= {"want_dh": want_dh and kept is not None}
    found, dh = row_pass(head, target, rows, plan, shard, **pass_options)
    if want_dh and dh is None:
        dh = torch.empty(count, hidden_size, **options)
    weight, into = weigh(found), Gradients(dh, dw, db)
    found = with_room_above(found, head)
    order = weights_in_order(head, rows, found, weight)
    first_rest = 0
    if kept is not None:
        add_kept_rows(kept, rows, found, order, into)
        first_rest = kept.chunk.rows
        del kept, pass_options  # and their buffers
    if first_rest < count:
        chunk = Chunk(head, plan, count - first_rest, plan.again, final=True)
        for first_row in range(first_rest, count, chunk.rows):
            add_rows_again(chunk, target, rows, found, order, into, first_row, shard)
    if dh is not None:
        again = head.logit_scale * found.share
        factor = torch.where(rows.place < first_rest, found.factor, again)
        finish_dh(dh, head, plan, rows, found.local_target, factor, found.target_factor, shard)
    return found, weight, into


def row_pass(
    head: LinearInputs,
    target: Tensor,
    rows: Rows,
    plan: Plan,
    shard: VocabShard | None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    want_dh: bool = False,
    kept: KeptRows | None = None,
    guide: Guide | None = None,
) -> tuple[RowResult, Tensor | None]:
    """Statistics of valid tokens and, if wanted, dH float32 [N, D] of each row's nll.

    With `kept` the exponentials of its rows are kept, dH of all other rows is left undefined, and
    the caller finishes dH. With `guide` the guide's nll comes from the same launches.
    """
    count = head.hidden.shape[0]
    state = new_state(head)
    beside = new_state(guide.head) if guide is not None else None
    # Allocated at its first use, after the guide's buffers of the kept rows are freed.
    dh = functools.cache(lambda: state.parts.new_empty(head.hidden.shape))
    first_rest = 0
    if kept is not None:
        sums = dh if want_dh else None
        _add_row_chunk(kept.chunk, target, rows, state, sums, 0, shard, guide, beside, kept)
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
        _add_row_chunk(chunk, target, rows, state, sums, first_row, shard, guide, beside)
    found = finish_rows(state, rows, head, with_entropy, shard, temperature)
    if guide is not None and beside is not None:
        of_guide = finish_rows(beside, rows, guide.head, False, shard, guide.temperature)
        found = found._replace(guide_nll=of_guide.nll)
    if exponentials:
        factors = (found.factor, found.target_factor)
        finish_dh(dh(), head, plan, rows, state.local_target, *factors, shard)
    return found, dh() if want_dh else None


def _add_row_chunk(
    chunk: Chunk,
    target: Tensor,
    rows: Rows,
    state: RowState,
    dh: Callable[[], Tensor] | None,
    first_row: int,
    shard: VocabShard | None,
    guide: Guide | None,
    guide_state: RowState | None,
    kept: KeptRows | None = None,
) -> None:
    """Runs a chunk of rows over all columns; the guide's share the first launch."""
    chunk.gather(target, rows, state, first_row, shard, guess=chunk.exponentials)
    side = None
    if guide is not None and guide_state is not None:
        side = GuideSide(_guide_chunk(guide, chunk), guide_state)
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


def _guide_chunk(guide: Guide, chunk: Chunk) -> Chunk:
    """Buffers for the guide's rows of a chunk, and all of its columns at once."""
    return Chunk(
        guide.head,
        chunk.plan,
        guide.head.hidden.shape[0],
        (chunk.rows, ALL),
        temperature=guide.temperature,
        exponentials=False,
    )


def shares_launches(problem: Problem) -> bool:
    """Whether a guide's tiles run in the model's launches.

    Not under a threshold: the guide then leaves rows out of the model's products, which is worth
    more. Nor where tiles of another dtype are needed.
    """
    guide, threshold = problem.guide, problem.transform.threshold
    if guide is None or (threshold > 0 and not problem.keep_zero_rows):
        return False
    return guide.hidden.dtype == problem.head.hidden.dtype


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """dW [V, D] and db [V] of Σ_i row_factor_i · nll_i; empty where not wanted."""
    check_dtype(head.hidden)
    head, target = with_contiguous_bias(head), target.contiguous()
    plan = plan or default_plan(head)
    weight = row_factor.float()
    rows = valid_tokens(target, ignore_index, weight)
    _, _, (_, dw, db) = head_gradients(
        head, target, rows, plan, shard, lambda found: weight, want_dw=want_dw, want_db=want_db
    )
    empty = weight.new_empty(0)
    return dw if dw is not None else empty, db if db is not None else empty.clone()


def scaled_rows(rows: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """rows float32 [N, D] times factor [N], rounded once to `dtype`, with no copy in between."""
    count, size = rows.shape
    out = torch.empty(count, size, dtype=dtype, device=rows.device)
    if out.numel() > 0:
        block = INTERPRETER_ROW_BLOCK if knobs.runtime.interpret else ROW_BLOCK
        grid = (triton.cdiv(count, block[0]), triton.cdiv(size, block[1]))
        row_gradients._scale_rows_kernel[grid](
            rows.contiguous(),
            factor.float(),
            out,
            count,
            size,
            factor.stride(0),
            BLOCK_N=block[0],
            BLOCK_D=block[1],
        )
    return out


def contiguous(problem: Problem) -> Problem:
    """The problem with contiguous targets and biases, which kernels assume."""
    guide = problem.guide
    return problem._replace(
        head=with_contiguous_bias(problem.head),
        guide=with_contiguous_bias(guide) if guide is not None else None,
        target=problem.target.contiguous(),
    )


def with_contiguous_bias(head: LinearInputs) -> LinearInputs:
    """Hidden states and head weights may have any strides, biases may not."""
    return head._replace(bias=head.bias.contiguous() if head.bias is not None else None)


def check_dtype(hidden: Tensor) -> None:
    """Raises ValueError for dtypes whose products these kernels cannot accumulate."""
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f'impl="triton": expected bfloat16, float16 or float32, got {hidden.dtype}; '
            'use impl="eager"'
        )
