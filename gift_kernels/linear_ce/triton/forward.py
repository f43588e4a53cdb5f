"""Linear cross-entropy in Triton: `solve` and `solve_head_gradient` as in `eager`.

Statistics and dH, one pass (one unit of 2 N V D flops for each of its two products):

    for a chunk of rows that count, gathered side by side:
        for a chunk of C columns of the vocabulary:
            E = 2^(x − ref) in the dtype of the head, and the partial sums of every row
            sums join the state of their rows; dH += E W
    dH = factor · dH + target_factor · W_y              once the log-sum-exp is known

Statistics alone are the same without E. dW and db need the probabilities of all rows for one chunk
of the vocabulary, hence the log-sum-exp beforehand: they come from a second pass, which knows the
final references and makes dH too. So a trainable head costs four products; three where only
dW is asked for, and for rows whose E is kept (see `head_gradient`).

A guide's tiles run in the launches of the model's first chunk of columns, and the weights are made
of both results, unless a threshold lets the guide leave rows out of the model's products: then the
guide goes first.

Nothing waits for the device: the number of rows that count is computed and read there, and the
launches cover the case that all count. Memory: dH float32 [N, D] as the caller gets it, E and the
gathered rows of one chunk (see `chunk_size`), the partial sums; none grows with N V.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from gift_kernels.linear_ce.triton.chunk_size import (
    INTERPRETER_ROW_BLOCK,
    ROW_BLOCK,
    Plan,
    default_plan,
)
from gift_kernels.linear_ce.triton.head_gradient import head_gradients
from gift_kernels.linear_ce.triton.kernels import rows as triton_rows
from gift_kernels.linear_ce.triton.row_pass import RowResult, row_pass, rows_that_count
from gift_kernels.linear_ce.types import Head, LinearCE, Problem, VocabShard
from gift_kernels.reference import transform_weight


def solve(problem: Problem, plan: Plan | None = None) -> LinearCE:
    """Answers one call of the operator on the rows that count."""
    problem = contiguous(problem)
    head, target = problem.head, problem.target
    check_dtype(head.hidden)
    grad = problem.want_dh or problem.want_dw or problem.want_db
    want_dw = problem.want_dw and not problem.rowwise
    want_db = problem.want_db and not problem.rowwise
    kept = target != problem.ignore_index
    rows = rows_that_count(target, problem.ignore_index)
    weight = kept.float()
    together = problem.guide if shares_launches(problem) else None
    plan = plan or default_plan(head, together, with_entropy=problem.with_entropy)

    def confidence(nll: Tensor) -> Tensor:
        return torch.where(kept, transform_weight(torch.exp(-nll), problem.transform), 0)

    def weigh(found: RowResult) -> Tensor:
        if found.guide_nll is not None:
            return confidence(found.guide_nll)
        return confidence(found.nll) if problem.self_weight else weight

    if problem.guide is not None and together is None:
        first = (problem.guide, target, rows, default_plan(problem.guide), problem.shard)
        found, _ = row_pass(*first, temperature=problem.temperature)
        weight = confidence(found.nll)
    elif problem.row_weight is not None:
        weight = torch.where(kept, problem.row_weight.float(), 0)
    weighted = problem.guide is not None or problem.row_weight is not None
    if weighted and together is None and not problem.keep_zero_rows:
        rows = rows_that_count(target, problem.ignore_index, weight)
    options: dict[str, Any] = {
        "with_entropy": problem.with_entropy,
        "want_dh": problem.want_dh,
        "guide": together,
        "guide_temperature": problem.temperature,
    }
    dw = db = None
    if want_dw or want_db:
        options |= {"want_dw": want_dw, "want_db": want_db}
        found, weight, dh, dw, db = head_gradients(
            head, target, rows, plan, problem.shard, weigh, **options
        )
    else:
        own = 1.0 if grad or problem.guide is not None else problem.temperature
        found, dh = row_pass(head, target, rows, plan, problem.shard, temperature=own, **options)
        weight = weigh(found)
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
    head: Head,
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
    rows = rows_that_count(target, ignore_index, weight)
    _, _, _, dw, db = head_gradients(
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
        triton_rows._scale_rows_kernel[grid](
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
    """The problem with targets and biases that kernels may read one after the other."""
    guide = problem.guide
    return problem._replace(
        head=with_contiguous_bias(problem.head),
        guide=with_contiguous_bias(guide) if guide is not None else None,
        target=problem.target.contiguous(),
    )


def with_contiguous_bias(head: Head) -> Head:
    """Hidden states and head weights may have any strides, biases may not."""
    return head._replace(bias=head.bias.contiguous() if head.bias is not None else None)


def check_dtype(hidden: Tensor) -> None:
    """Raises ValueError for dtypes whose products these kernels cannot accumulate."""
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f'impl="triton": expected bfloat16, float16 or float32, got {hidden.dtype}; '
            'use impl="eager"'
        )
