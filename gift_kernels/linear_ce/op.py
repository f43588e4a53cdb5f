"""The operator below `weighted_ce` and `token_confidence`, one for all implementations.

It returns the loss, the rows' statistics and, if requested, gradients computed in the forward: dH
of every row, unscaled, and dW and db of the weighted sum. The backward only scales them: row i of
dH by its weight and upstream gradient, dW and db by the upstream gradient of the sum.

With a trainable head two cases leave dW and db to the backward. If each row has its own upstream
gradient (`reduction="none"`), `gift_kernels::linear_ce_head_gradient` recomputes the logits.
Otherwise Triton keeps the exponentials of a call that is not traced, if all rows fit, and
multiplies them in the backward (`LinearCE.deferred`).

`linear_ce` is registered as `gift_kernels::linear_ce` for torch.compile and other tracing. Outside
of it `call` runs the same functions as a plain `autograd.Function`: a registered operator with so
many arguments takes 0.25 to 0.3 ms more of the host's time for each forward, nearly all of it in
Python (torch 2.13), where a whole call of few tokens takes as much.

Saved for the backward: dH float32 [splits, N, D], the row weights and, for a trainable head, dW and
db or what they are made of.
Rows that are ignored, and rows of weight 0 unless `keep_zero_rows`, are left out of all products.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

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


def call(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    *rest: Any,
) -> LinearCE:
    """The operator with the arguments of `solve`; differentiable in the loss."""
    if not is_plain(hidden, lm_head_weight, bias, target, row_weight):
        return LinearCE(*linear_ce(hidden, lm_head_weight, bias, target, row_weight, *rest))
    trained = (hidden, lm_head_weight, bias, row_weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return LinearCE(*_LinearCE.apply(*trained, (target, rest)))  # pyright: ignore
    return solve(hidden, lm_head_weight, bias, target, row_weight, *rest)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all tensors have values and none is traced, so that any function can take them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return False
    return all(
        tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta)
        for tensor in tensors
    )


def solve(
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
    mean: bool,
    with_stats: bool,
    with_entropy: bool,
    keep_zero_rows: bool,
    group_name: str | None,
    vocab_start: int,
    impl: str,
    chunk_size: int | None,
    defer: bool = False,
) -> LinearCE:
    """hidden [N, D], lm_head_weight [V, D], target int64 [N], row_weight [N]; see `Problem`.

    With `mean` the sum of the loss is divided by the number of rows that are not ignored.
    """
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
        with_stats=with_stats,
        with_entropy=with_entropy,
        keep_zero_rows=keep_zero_rows,
        shard=None,
        chunk_size=chunk_size,
        defer=defer,
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
    with _surroundings(impl, hidden):
        result = _backend(impl).solve(problem)
    return result._replace(loss=result.loss / result.row_count) if mean else result


def _surroundings(impl: str, hidden: Tensor) -> Any:
    """Without autocast where PyTorch multiplies, on the tensors' device where Triton launches."""
    if impl == "eager":
        return torch.autocast(hidden.device.type, enabled=False)
    return torch.cuda.device_of(hidden)


def _backend(impl: str) -> Any:
    if impl == "eager":
        return eager
    assert impl == "triton", impl
    # Imported here because everything else works without Triton.
    from gift_kernels.linear_ce.triton import forward as triton_ce

    return triton_ce


def _shard(group_name: str, vocab_start: int) -> VocabShard:
    """The slice, without `most`, which needs a collective."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return VocabShard(_resolve_process_group(group_name), vocab_start, 0)  # pyright: ignore


def _registered(*arguments: Any) -> tuple[Tensor, ...]:
    *found, _ = result = solve(*arguments)
    return tuple(result.nll.new_empty(0) if value is None else value for value in found)


_registered.__signature__ = inspect.Signature(
    list(inspect.signature(solve).parameters.values())[:-1],  # all but `defer`
    return_annotation=tuple[(Tensor,) * (len(LinearCE._fields) - 1)],
)
linear_ce = torch.library.custom_op("gift_kernels::linear_ce", _registered, mutates_args=())
_ARGUMENT_NAMES = [argument.name for argument in linear_ce._opoverload._schema.arguments]


@linear_ce.register_fake
def _(hidden, lm_head_weight, bias, target, *arguments):  # pyright: ignore
    options = dict(zip(_ARGUMENT_NAMES[4:], arguments, strict=True))
    dtype = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0]

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape if wanted else (0,), dtype=dtype)

    head_wanted = not options["rowwise"]
    return LinearCE(
        loss=empty(*(count,) * options["rowwise"]),
        row_count=empty(),
        nll=empty(count),
        weight=empty(count),
        lse=empty(count, wanted=options["with_stats"]),
        top1=empty(count, dtype=torch.bool) if options["with_stats"] else empty(0),
        largest=empty(count, wanted=options["with_stats"]),
        entropy=empty(count, wanted=options["with_entropy"]),
        dh=empty(*hidden.shape, wanted=options["want_dh"]),
        dw=empty(*lm_head_weight.shape, wanted=options["want_dw"] and head_wanted),
        db=empty(lm_head_weight.shape[0], wanted=options["want_db"] and head_wanted),
    )[:-1]


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
    with _surroundings(impl, hidden):
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
def scaled_rows(rows: Tensor, factor: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows float32 [N, D] times factor [N] or [], times weight [N], in `dtype`; for Triton.

    Without a float32 copy.
    """
    return _scaled_rows(rows, factor, weight, dtype)


def _scaled_rows(rows: Tensor, factor: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    from gift_kernels.linear_ce.triton import forward as triton_ce

    with torch.cuda.device_of(rows):
        return triton_ce.scaled_rows(rows, factor, weight, dtype)


@scaled_rows.register_fake
def _(rows, factor, weight, dtype):  # pyright: ignore
    return rows.new_empty(rows.shape, dtype=dtype)


_TRAINED = ("hidden", "lm_head_weight", "bias", "row_weight")
# Arguments of `head_gradient` after its tensors.
_RECOMPUTE_OPTIONS = (
    *("logit_scale", "logit_softcap", "ignore_index", "want_dw", "want_db"),
    *("group_name", "vocab_start", "impl", "chunk_size"),
)


def _save(ctx: Any, arguments: tuple[Any, ...], result: LinearCE, weight_trained: bool) -> None:
    """Saves in `ctx` what `_gradients` needs."""
    options = dict(zip(_ARGUMENT_NAMES, arguments, strict=True))
    trained = [options[name] for name in _TRAINED]
    ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in trained]
    ctx.wanted = (options["want_dh"], options["want_dw"], options["want_db"])
    ctx.impl, ctx.recompute, ctx.deferred, inputs = options["impl"], None, None, ()
    if result.deferred is not None:
        # Its tensors are saved as autograd saves tensors, which frees them in the backward. The
        # head's values are not needed: it may change, or be freed, before the backward.
        head = (options["lm_head_weight"].shape, options["logit_scale"], options["logit_softcap"])
        ctx.deferred = (result.deferred._replace(tensors=[]), head)
        inputs = tuple(result.deferred.tensors)
    elif options["rowwise"] and (options["want_dw"] or options["want_db"]):
        ctx.recompute = [options[name] for name in _RECOMPUTE_OPTIONS]
        inputs = arguments[:4]
    ctx.save_for_backward(
        result.dh,
        result.dw,
        result.db,
        result.weight,
        result.nll if weight_trained else None,
        result.row_count if options["mean"] else None,
        *inputs,
    )
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """The gradients of `_TRAINED`, from that of the loss."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gift_kernels: the gradient of weighted_ce cannot itself be differentiated; call "
            "backward without create_graph=True"
        )
    dh, dw, db, weight, nll, row_count, *inputs = ctx.saved_tensors
    if upstream is None:
        return [None] * len(_TRAINED)
    of_sum: Tensor = upstream if row_count is None else upstream / row_count
    (want_dh, want_dw, want_db), row_weight_gradient = ctx.wanted, None
    hidden_dtype, head_dtype, bias_dtype, row_weight_dtype = ctx.dtypes
    rescaled = _scaled_rows if is_plain(of_sum) else scaled_rows
    if want_dh:
        if ctx.impl == "triton":
            dh = rescaled(dh, of_sum, weight, hidden_dtype)
        else:
            dh = eager.scale_rows(dh, of_sum * weight).to(hidden_dtype)
    if ctx.deferred is not None:
        dw, db = _deferred_gradients(ctx, inputs, of_sum)
    elif ctx.recompute is not None:
        dw, db = head_gradient(*inputs, of_sum * weight, *ctx.recompute)
    elif want_dw and ctx.impl == "triton":
        dw = rescaled(dw, of_sum, None, head_dtype)
    elif want_dw:
        dw = torch.where(of_sum == 0, 0, dw * of_sum)
    if want_db and ctx.recompute is None and ctx.deferred is None:
        db = torch.where(of_sum == 0, 0, db * of_sum)
    if nll is not None:
        # A row of weight 0 whose nll is infinite or NaN adds 0 to the loss: its weight's gradient
        # is 0 too.
        counted = torch.where((weight != 0) | nll.isfinite(), nll, 0)
        row_weight_gradient = (of_sum * counted).to(row_weight_dtype)
    return [
        dh if want_dh else None,
        dw.to(head_dtype) if want_dw else None,
        db.to(bias_dtype) if want_db else None,
        row_weight_gradient,
    ]


@torch._disable_dynamo  # compiled autograd would trace the launches
def _deferred_gradients(ctx: Any, saved: list[Tensor], upstream: Tensor) -> tuple[Tensor, Any]:
    """dW, and db where it is wanted, of what `solve` deferred."""
    deferred, (shape, logit_scale, logit_softcap) = ctx.deferred
    found = deferred._replace(tensors=saved)
    # In the place of the head is its gradient.
    head = LinearInputs(saved[0], saved[0].new_empty(shape), None, logit_scale, logit_softcap)
    with _surroundings(ctx.impl, upstream):
        return _backend(ctx.impl).solve_deferred(head, found, upstream, want_db=ctx.wanted[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight_trained = ctx.needs_input_grad[_ARGUMENT_NAMES.index("row_weight")]
    _save(ctx, inputs, LinearCE(*output), weight_trained)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    found: dict[str, Tensor | None] = dict.fromkeys(_ARGUMENT_NAMES)
    found |= zip(_TRAINED, _gradients(ctx, upstream[0]), strict=True)
    return tuple(found.values())


linear_ce.register_autograd(_backward, setup_context=_setup_context)


class _LinearCE(torch.autograd.Function):
    """`linear_ce` as a plain autograd function, without the overhead of a registered operator."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        hidden: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor | None,
        others: tuple[Tensor, tuple[Any, ...]],
    ) -> LinearCE:
        target, rest = others
        arguments = (hidden, lm_head_weight, bias, target, row_weight, *rest)
        result = solve(*arguments, defer=True)
        _save(ctx, arguments, result, ctx.needs_input_grad[_TRAINED.index("row_weight")])
        ctx.mark_non_differentiable(*(value for value in result[1:-1] if value is not None))
        return result._replace(deferred=None)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream[0]), None
