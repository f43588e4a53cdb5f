"""The operator below `weighted_ce` and `token_confidence`, registered once for all implementations.

`gift_kernels::linear_ce` returns the weighted sum of the rows' nll, the rows' statistics and, if
requested, gradients computed in the forward: dH of every row, unscaled, and dW and db of the
weighted sum. The backward only scales them: row i of dH by the upstream gradient of that row, dW
and db by the upstream gradient of the sum.
Where each row has an upstream gradient of its own (`reduction="none"`) and the head is trainable,
dW is made in the backward by `gift_kernels::linear_ce_head_gradient`, from recomputed logits.

Saved for the backward: dH float32 [N, D], the row weights and, for a trainable head, dW and db.
Rows that are ignored, and rows of weight 0 unless `keep_zero_rows`, are left out of all products.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gift_kernels import checks
from gift_kernels.linear_ce import eager
from gift_kernels.linear_ce.agreement import agree, most_rows
from gift_kernels.linear_ce.types import (
    LinearCE,
    LinearInputs,
    Problem,
    VocabShard,
    WeightTransform,
    accumulation_dtype,
)


@torch.library.custom_op("gift_kernels::linear_ce", mutates_args=())
def linear_ce(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    guide_hidden: Tensor | None,
    guide_lm_head_weight: Tensor | None,
    guide_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    guide_logit_scale: float,
    guide_logit_softcap: float | None,
    temperature: float,
    self_weight: bool,
    power: float,
    floor: float,
    threshold: float,
    ignore_index: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    rowwise: bool,
    with_entropy: bool,
    keep_zero_rows: bool,
    group_name: str | None,
    vocab_start: int,
    impl: str,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], lm_head_weight [V, D], target int64 [N], row_weight [N]; see `Problem`."""
    guide = None
    if guide_hidden is not None:
        assert guide_lm_head_weight is not None
        guide = LinearInputs(
            guide_hidden, guide_lm_head_weight, guide_bias, guide_logit_scale, guide_logit_softcap
        )
    problem = Problem(
        head=LinearInputs(hidden, lm_head_weight, bias, logit_scale, logit_softcap),
        guide=guide,
        target=target,
        row_weight=row_weight,
        temperature=temperature,
        self_weight=self_weight,
        transform=WeightTransform(power, floor, threshold),
        ignore_index=ignore_index,
        want_dh=want_dh,
        want_dw=want_dw,
        want_db=want_db,
        rowwise=rowwise,
        with_entropy=with_entropy,
        keep_zero_rows=keep_zero_rows,
        shard=None,
        chunk_size=chunk_size,
    )
    vocab_sizes = {name: head.weight.shape[0] for name, head in problem.heads().items()}
    if group_name is not None:
        shard = _shard(group_name, vocab_start)
        slices = agree(problem, shard, impl)
        vocab_sizes = {name: found.whole for name, found in slices.items()}
        most = max(found.most for found in slices.values())
        problem = problem._replace(shard=shard._replace(most=most))
    if checks.reads_targets(target):
        for name, vocab_size in vocab_sizes.items():
            checks.target_values(target, vocab_size, ignore_index, name)
    with _on_device_of(hidden):
        return _backend(impl).solve(problem)


@contextlib.contextmanager
def _on_device_of(hidden: Tensor) -> Iterator[None]:
    """Makes the tensors' device current, where Triton launches; switches autocast off."""
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        yield


def _backend(impl: str) -> Any:
    if impl == "eager":
        return eager
    assert impl == "triton", impl
    # Imported here because everything else works without Triton.
    from gift_kernels.linear_ce.triton import forward as triton_ce

    return triton_ce


def _shard(group_name: str, vocab_start: int) -> VocabShard:
    """The slice, without `most`: ranks know that from each other."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return VocabShard(_resolve_process_group(group_name), vocab_start, 0)  # pyright: ignore


@linear_ce.register_fake
def _(hidden, lm_head_weight, bias, target, *arguments):  # pyright: ignore
    names = _ARGUMENT_NAMES[4:]
    options = dict(zip(names, arguments, strict=True))
    dtype = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0]

    def rows() -> Tensor:
        return hidden.new_empty(count, dtype=dtype)

    def wanted(flag: bool, *shape: int) -> Tensor:
        return hidden.new_empty(shape if flag else (0,), dtype=dtype)

    head_wanted = not options["rowwise"]
    return LinearCE(
        total=hidden.new_empty((), dtype=dtype),
        nll=rows(),
        lse=rows(),
        entropy=wanted(options["with_entropy"], count),
        top1=hidden.new_empty(count, dtype=torch.bool),
        weight=rows(),
        dh=wanted(options["want_dh"], *hidden.shape),
        dw=wanted(options["want_dw"] and head_wanted, *lm_head_weight.shape),
        db=wanted(options["want_db"] and head_wanted, lm_head_weight.shape[0]),
    )


_ARGUMENT_NAMES = [argument.name for argument in linear_ce._opoverload._schema.arguments]


@torch.library.custom_op("gift_kernels::linear_ce_head_gradient", mutates_args=())
def head_gradient(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_factor: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    want_dw: bool,
    want_db: bool,
    group_name: str | None,
    vocab_start: int,
    impl: str,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """dW [V, D] and db [V] of Σ_i row_factor_i · nll_i; empty where not wanted."""
    shard = None
    if group_name is not None:
        shard = _shard(group_name, vocab_start)
        shard = shard._replace(most=most_rows(lm_head_weight.shape[0], shard))
    with _on_device_of(hidden):
        head = LinearInputs(hidden, lm_head_weight, bias, logit_scale, logit_softcap)
        return _backend(impl).solve_head_gradient(
            head,
            torch.where(row_factor == 0, ignore_index, target),
            row_factor,
            ignore_index=ignore_index,
            want_dw=want_dw,
            want_db=want_db,
            shard=shard,
            chunk_size=chunk_size,
        )


@head_gradient.register_fake
def _(hidden, lm_head_weight, bias, target, row_factor, *arguments):  # pyright: ignore
    want_dw, want_db = arguments[3], arguments[4]
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty(lm_head_weight.shape if want_dw else (0,), dtype=dtype),
        hidden.new_empty(lm_head_weight.shape[:1] if want_db else (0,), dtype=dtype),
    )


@torch.library.custom_op("gift_kernels::linear_ce_scaled_rows", mutates_args=())
def scaled_rows(rows: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """rows float32 [N, D] times factor [N], written in `dtype` by Triton without a float32 copy."""
    from gift_kernels.linear_ce.triton import forward as triton_ce

    with torch.cuda.device_of(rows):
        return triton_ce.scaled_rows(rows, factor, dtype)


@scaled_rows.register_fake
def _(rows, factor, dtype):  # pyright: ignore
    return rows.new_empty(rows.shape, dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    options = dict(zip(_ARGUMENT_NAMES, inputs, strict=True))
    result = LinearCE(*output)
    ctx.options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    ctx.dtypes = {name: value.dtype for name, value in options.items() if isinstance(value, Tensor)}
    recompute = options["rowwise"] and (options["want_dw"] or options["want_db"])
    ctx.recompute = recompute
    ctx.save_for_backward(
        result.dh,
        result.dw,
        result.db,
        result.weight,
        result.nll if options["row_weight"] is not None else None,
        *((options[name] if recompute else None) for name in _RECOMPUTE_INPUTS),
    )
    ctx.set_materialize_grads(False)


_RECOMPUTE_INPUTS = ("hidden", "lm_head_weight", "bias", "target")


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gift_kernels: the gradient of weighted_ce cannot itself be differentiated; call "
            "backward without create_graph=True"
        )
    dh, dw, db, weight, nll, *inputs = ctx.saved_tensors
    options = ctx.options
    gradient: dict[str, Tensor | None] = dict.fromkeys(_ARGUMENT_NAMES)
    g_total, g_nll = upstream[0], upstream[1]
    if not options["rowwise"]:
        factor = g_total * weight if g_total is not None else None
    else:
        factor = g_nll
    if factor is None:
        return tuple(gradient.values())
    if options["want_dh"]:
        dtype = ctx.dtypes["hidden"]
        if options["impl"] == "triton":
            gradient["hidden"] = scaled_rows(dh, factor, dtype)
        else:
            gradient["hidden"] = eager.scale_rows(dh, factor).to(dtype)
    if ctx.recompute:
        hidden, lm_head_weight, bias, target = inputs
        names = ("logit_scale", "logit_softcap", "ignore_index", "want_dw", "want_db")
        names += ("group_name", "vocab_start", "impl", "chunk_size")
        dw, db = head_gradient(
            hidden, lm_head_weight, bias, target, factor, *(options[name] for name in names)
        )
    elif g_total is not None:
        if options["want_dw"] and options["impl"] == "triton":
            dw = scaled_rows(dw, g_total.expand(dw.shape[0]), ctx.dtypes["lm_head_weight"])
        else:
            dw = dw * g_total
        db = db * g_total
    if options["want_dw"]:
        gradient["lm_head_weight"] = dw.to(ctx.dtypes["lm_head_weight"])
    if options["want_db"]:
        gradient["bias"] = db.to(ctx.dtypes["bias"])
    if nll is not None and g_total is not None and not options["rowwise"]:
        # A row of weight 0 whose nll is infinite or NaN adds 0 to the loss: its weight's gradient
        # is 0 too.
        counted = torch.where((weight != 0) | nll.isfinite(), nll, 0)
        gradient["row_weight"] = (g_total * counted).to(ctx.dtypes["row_weight"])
    return tuple(gradient.values())


linear_ce.register_autograd(_backward, setup_context=_save_for_backward)
