"""Linear cross-entropy in Triton: `solve` and `solve_head_gradient` as in `eager`.

From a row's weight to its gradient:

1. `valid_tokens` lists the rows that are not ignored, and not of weight 0 where weights are given.
2. `row_pass` runs over all logits once. Per chunk of rows, per chunk of C columns: `Chunk.logits`
   stores E = 2^(x − ref) and partial sums, `Chunk.merge` adds the sums to the rows' state,
   `Chunk.add_to_dh` adds E W to dH, for few rows in `Plan.splits` parts of the columns.
3. `finish_rows` computes nll and two factors from the state, and the gradient of each row's nll:
   dH = factor · ΣE W + target_factor · W_y (with a trainable head `finish_dh`, once dH is
   complete). No weight has entered yet.
4. Given weights were transformed in step 1; if they are confidences, `finish_rows` writes them.
5. dH: the operator's backward multiplies row i by its weight and its upstream gradient
   (`scaled_rows`). dW and db: `solve_deferred` in the backward, or for more rows `head_gradients`,
   multiplies E by the weights and the hidden states (`Chunk.add_to_dw`); see `head_gradient`.

Statistics alone are step 2 without E. A trainable head costs three products for rows whose E is
kept until the weights are known, and where only dW is wanted; four for all other rows.

A guide's tiles run in the launches of the model's first chunk of columns. With a threshold the
guide runs first instead, so that rows below it are excluded from the model's products.

The host never synchronises with the device: the number of valid tokens is computed and read there,
and launches are sized for N. Memory: dH float32 [N, D], which is returned; E and the gathered rows
of one chunk (see `chunk_size`); the partial sums. Nothing grows with N V.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from gift_kernels.linear_ce.triton.chunk import Chunk, GuideSide, KeptRows
from gift_kernels.linear_ce.triton.chunk_size import (
    ALL,
    INTERPRETER_ROW_BLOCK,
    ROW_BLOCK,
    Plan,
    cdiv,
    default_plan,
)
from gift_kernels.linear_ce.triton.head_gradient import (
    Deferred,
    Gradients,
    add_kept_rows,
    add_rows_again,
    deferred,
    deferred_gradients,
    kept_rows,
    most_kept,
    weights_in_order,
    with_room_above,
)
from gift_kernels.linear_ce.triton.kernels import row_gradients
from gift_kernels.linear_ce.triton.launch import Launch
from gift_kernels.linear_ce.triton.row_state import (
    Asked,
    RowFactors,
    Rows,
    RowState,
    RowStats,
    finish_dh,
    finish_rows,
    new_state,
    valid_tokens,
)
from gift_kernels.linear_ce.types import (
    NO_TRANSFORM,
    LinearCE,
    LinearInputs,
    Problem,
    VocabShard,
    WeightTransform,
)


class Guide(NamedTuple):
    """A second head, whose transformed confidences are the weights of the same rows."""

    head: LinearInputs
    temperature: float
    transform: WeightTransform


def solve(problem: Problem, plan: Plan | None = None) -> LinearCE:
    """Computes one call of the operator on its valid tokens."""
    problem = contiguous(problem)
    head, target, transform = problem.head, problem.target, problem.transform
    check_dtype(head.hidden)
    together = problem.guide if shares_launches(problem) else None
    plan = plan or default_plan(head, together, with_entropy=problem.with_entropy)
    rows = valid_tokens(
        target,
        problem.ignore_index,
        problem.row_weight,
        NO_TRANSFORM if problem.self_weight or problem.guide is not None else transform,
        keep_zero_rows=problem.keep_zero_rows,
    )
    if problem.guide is not None and together is None:
        first = (problem.guide, target, rows, default_plan(problem.guide), problem.shard)
        row_pass(*first, Asked(confidence=transform), temperature=problem.temperature)
        if not problem.keep_zero_rows:
            rows = valid_tokens(target, problem.ignore_index, rows.weight)
    asked = Asked(
        stats=problem.with_stats,
        entropy=problem.with_entropy,
        dh=problem.want_dh,
        confidence=transform if problem.self_weight else None,
    )
    guide = None if together is None else Guide(together, problem.temperature, transform)
    call = (head, target, rows, plan, problem.shard, asked)
    dw, db, left = None, None, None
    wanted = {"want_dw": problem.want_dw, "want_db": problem.want_db}
    if problem.rowwise or not any(wanted.values()):
        grad = problem.want_dh or any(wanted.values())
        own = 1.0 if grad or problem.guide is not None else problem.temperature
        found, dh, _ = row_pass(*call, temperature=own, guide=guide)
    elif problem.defer and problem.want_dw and 0 < target.shape[0] <= most_kept(head, plan):
        found, dh, left = row_pass_for_later(*call, guide)
    else:
        found, (dh, dw, db) = head_gradients(*call, **wanted, guide=guide)
    return LinearCE(
        loss=found.loss if problem.rowwise else found.loss.sum(),
        row_count=rows.row_count,
        nll=found.nll,
        weight=rows.weight,
        lse=found.lse,
        top1=found.top1,
        largest=found.largest,
        entropy=found.entropy,
        dh=None if dh is None else dh[0],
        dw=dw,
        db=db,
        deferred=left,
    )


def row_pass_for_later(
    head: LinearInputs,
    target: Tensor,
    rows: Rows,
    plan: Plan,
    shard: VocabShard | None,
    asked: Asked,
    guide: Guide | None,
) -> tuple[RowStats, Tensor | None, Deferred]:
    """`row_pass` with dH finished, and what `solve_deferred` makes dW and db of."""
    kept = kept_rows(head, plan, head.hidden.shape[0], asked.entropy, None)
    asked = asked._replace(factors=True)
    found, dh, factors = row_pass(head, target, rows, plan, shard, asked, kept=kept, guide=guide)
    assert kept is not None and factors is not None
    if dh is not None:
        of_rows = (factors.local_target, factors.factor, factors.target_factor)
        finish_dh(dh, head, plan, rows, *of_rows, shard)
    return found, dh, deferred(kept, rows, factors)


def solve_deferred(
    head: LinearInputs, found: Deferred, upstream: Tensor, *, want_db: bool
) -> tuple[Tensor, Tensor | None]:
    """dW [V, D], written to `head.weight`, and db float32 [V] if wanted, both times upstream []."""
    _, dw, db = deferred_gradients(head, found, upstream, want_db=want_db)
    assert dw is not None
    return dw, db


def head_gradients(
    head: LinearInputs,
    target: Tensor,
    rows: Rows,
    plan: Plan,
    shard: VocabShard | None,
    asked: Asked,
    *,
    want_dw: bool = False,
    want_db: bool = False,
    guide: Guide | None = None,
) -> tuple[RowStats, Gradients]:
    """Statistics and gradients; those of the head are weighted by `rows.weight`."""
    (count, hidden_size), (vocab_size, _) = head.hidden.shape, head.weight.shape
    new = torch.zeros if count == 0 else torch.empty
    options: dict[str, Any] = {"dtype": torch.float32, "device": head.hidden.device}
    dw = new(vocab_size, hidden_size, **options) if want_dw else None
    db = new(vocab_size, **options) if want_db else None
    kept = kept_rows(head, plan, count, asked.entropy, dw) if dw is not None else None
    first = asked._replace(dh=asked.dh and kept is not None, factors=True)
    pass_options: dict[str, Any] = {"kept": kept, "guide": guide}
    found, dh, factors = row_pass(head, target, rows, plan, shard, first, **pass_options)
    assert factors is not None
    if asked.dh and dh is None:
        dh = torch.empty(plan.splits, count, hidden_size, **options)
    into = Gradients(dh, dw, db)
    factors = with_room_above(factors, head)
    order = weights_in_order(head, rows, factors, rows.weight)
    first_rest = 0
    if kept is not None:
        add_kept_rows(kept, rows, factors, order, into)
        first_rest = kept.chunk.rows
        del kept, pass_options  # and their buffers
    if first_rest < count:
        chunk = Chunk(head, plan, count - first_rest, plan.again, final=True)
        for first_row in range(first_rest, count, chunk.rows):
            add_rows_again(chunk, target, rows, factors, order, into, first_row, shard)
    if dh is not None:
        exact = head.logit_scale * factors.share
        factor = torch.where(rows.place < first_rest, factors.factor, exact)
        finish_dh(dh, head, plan, rows, factors.local_target, factor, factors.target_factor, shard)
    return found, into


def row_pass(
    head: LinearInputs,
    target: Tensor,
    rows: Rows,
    plan: Plan,
    shard: VocabShard | None,
    asked: Asked,
    *,
    temperature: float = 1.0,
    kept: KeptRows | None = None,
    guide: Guide | None = None,
) -> tuple[RowStats, Tensor | None, RowFactors | None]:
    """Statistics of valid tokens and, if requested, float32 [splits, N, D] with dH of each row's
    nll first.

    With `kept` the exponentials of its rows are kept, dH of all other rows is left undefined, and
    the caller finishes dH. With `guide` its confidence, from the same launches, is the weight.
    """
    count = head.hidden.shape[0]
    state = new_state(head)
    beside = new_state(guide.head) if guide is not None else None
    # Allocated at its first use, after the guide's buffers of the kept rows are freed.
    dh = functools.cache(lambda: state.parts.new_empty(plan.splits, *head.hidden.shape))
    first_rest = 0
    if kept is not None:
        sums = dh if asked.dh else None
        _add_row_chunk(kept.chunk, target, rows, state, sums, 0, shard, guide, beside, kept)
        first_rest = kept.chunk.rows
    exponentials = asked.dh and kept is None
    most = plan.chunk if exponentials else plan.statistics
    if not exponentials and kept is None:
        most = most._replace(columns=ALL)
    if first_rest < count:
        chunk = Chunk(
            head,
            plan,
            count - first_rest,
            most,
            temperature=temperature,
            with_entropy=asked.entropy,
            exponentials=exponentials,
        )
        sums = dh if exponentials else None
        for first_row in range(first_rest, count, chunk.rows):
            _add_row_chunk(chunk, target, rows, state, sums, first_row, shard, guide, beside)
    if guide is not None and beside is not None:
        confidence = Asked(confidence=guide.transform)
        finish_rows(beside, rows, guide.head, shard, guide.temperature, confidence)
    finish = functools.partial(finish_rows, state, rows, head, shard, temperature, asked)
    found, factors = finish(dh(), plan.row_block) if exponentials else finish()
    return found, dh() if asked.dh else None, factors


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
    """Runs a chunk of rows over all columns; the guide's tiles are in the first launch."""
    chunk.gather(target, rows, state, first_row, shard)
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

    Not with a threshold: the guide then excludes rows from the model's products, which saves more.
    Nor if tiles of another dtype are needed.
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
    rows = valid_tokens(target, ignore_index, row_factor)
    wanted = {"want_dw": want_dw, "want_db": want_db}
    _, (_, dw, db) = head_gradients(head, target, rows, plan, shard, Asked(), **wanted)
    empty = row_factor.new_empty(0)
    return dw if dw is not None else empty, db if db is not None else empty.clone()


def scaled_rows(rows: Tensor, factor: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows float32 [N, D] times factor [N] or [], times weight [N]; rounded once to `dtype`."""
    count, size = rows.shape
    out = torch.empty(count, size, dtype=dtype, device=rows.device)
    if out.numel() > 0:
        launch, block = _scale_launch(rows.device)
        launch(
            row_gradients._scale_rows_kernel,
            (cdiv(count, block[0]), cdiv(size, block[1]), 1),
            rows.contiguous(),
            factor.float(),
            weight,
            out,
            count,
            size,
            factor.stride(0) if factor.ndim else 0,
        )
    return out


@functools.cache
def _scale_launch(device: torch.device) -> tuple[Launch, tuple[int, int]]:
    block = INTERPRETER_ROW_BLOCK if knobs.runtime.interpret else ROW_BLOCK
    return Launch(BLOCK_N=block[0], BLOCK_D=block[1]), block


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
    bias = head.bias
    return head if bias is None else head._replace(bias=bias.contiguous())


def check_dtype(hidden: Tensor) -> None:
    """Raises ValueError for dtypes whose products these kernels cannot accumulate."""
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f'impl="triton": expected bfloat16, float16 or float32, got {hidden.dtype}; '
            'use impl="eager"'
        )
