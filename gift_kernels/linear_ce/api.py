"""Per-token weighted linear cross-entropy, and the confidence in target tokens, without the logits.

    loss = Σ_i w_i · (−log softmax(z_i)[y_i]) / normalizer     z = softcap(s · (H Wᵀ + b))
    q_i  = softmax(z_i / T)[y_i]

The weights are a tensor, a guide model's confidence in the targets, computed in the same call, or
the model's own confidence. See `reference.py` for the formulas and their sources.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from gift_kernels import checks
from gift_kernels.implementation import Impl, resolve_impl
from gift_kernels.linear_ce import op as operator
from gift_kernels.linear_ce.types import (
    NO_TRANSFORM,
    Guide,
    LinearCE,
    LinearInputs,
    Reduction,
    Statistic,
    TokenStats,
    VocabParallel,
    WeightTransform,
    accumulation_dtype,
)
from gift_kernels.reference import normalized, transform_weight


@overload
def weighted_ce(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    token_weight: Tensor | Literal["self"] | None = None,
    *,
    guide: Guide | None = None,
    transform: WeightTransform | None = None,
    vocab_parallel: VocabParallel | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    stats: None = None,
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> Tensor: ...
@overload
def weighted_ce(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    token_weight: Tensor | Literal["self"] | None = None,
    *,
    guide: Guide | None = None,
    transform: WeightTransform | None = None,
    vocab_parallel: VocabParallel | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic],
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, TokenStats]: ...


def weighted_ce(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    token_weight: Tensor | Literal["self"] | None = None,
    *,
    guide: Guide | None = None,
    transform: WeightTransform | None = None,
    vocab_parallel: VocabParallel | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] | None = None,
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Weighted cross-entropy of `hidden @ lm_head_weight.T` against `target`.

    Args:
        hidden: [*B, D], the last hidden states (after the final norm), already aligned with
            `target`: position t predicts `target[t]`. bf16, fp16, fp32 or fp64.
        lm_head_weight: [V, D] of the same dtype and device. Gradients are computed only for
            tensors that require them: with a frozen head, forward and backward together cost two
            matrix products.
        target: int64 or int32 [*B], token ids or `ignore_index`.
        token_weight: [*B] floating-point weights, for example confidences annotated beforehand;
            "self" for the model's own detached confidence (DFT); None for 1, or for the guide's
            confidence where a guide is given. A tensor that requires grad receives its gradient.
        guide: a second model; its confidence in the targets becomes the weight.
        transform: applied to all weights; None leaves them unchanged.
        vocab_parallel: for a head that is sharded over ranks. Every rank gets the full loss and the
            full gradient of `hidden`. Each call starts with a small all-gather that checks that the
            ranks passed the same arguments; its result is read on the host.
        bias: [V], added to the logits before the scale.
        logit_scale: positive factor of the logits (Cohere's `logit_scale`; Granite divides: pass
            1 / `logits_scaling`).
        logit_softcap: c of c · tanh(z / c), after the scale (Gemma's `final_logit_softcapping`).
        reduction: "none" [*B]; "sum"; "mean": divided by the number of rows that are not ignored;
            "weighted_mean": divided by the sum of their weights. A mean of no rows is 0.
        normalizer: one number that replaces the divisor of "mean" and "weighted_mean", for example
            the count over a global batch. A loss of 0 divided by 0 is 0.
        ignore_index: rows with this target are not computed and have zero loss and gradient.
        stats: names of the `TokenStats` to return: "nll", "confidence", "lse", "entropy", "top1",
            "largest", "weight". Others are not computed where that saves work.
        impl: "eager" (chunked PyTorch), "triton", or "auto": Triton on NVIDIA's GPUs from Ampere on
            where nothing is float64, else eager.
        chunk_size: rows of logits the eager implementation holds at once; by default as many as
            fit in 512 MiB.

    Scalar options may be Python or NumPy numbers or 0-d tensors; reading a GPU tensor synchronizes.

    Returns:
        The loss, float32 (float64 for float64 inputs): [] or, for "none", [*B]; with `stats` a pair
        of the loss and the statistics.

    Raises:
        ValueError, TypeError: the message begins with the argument's name. Targets out of range
            raise on CPU; on CUDA their rows become NaN, or raise too when the environment variable
            GIFT_KERNELS_CHECK_TARGETS is 1. Derivatives of `torch.func`, forward mode and
            DTensors are refused.

    A row whose weight is exactly 0 contributes exactly 0 even where its nll is infinite or NaN.
    """
    reduction, ignore_index, chunk_size = checks.options(reduction, ignore_index, chunk_size)
    asked = checks.statistics(stats)
    transform = checks.weight_transform(transform)
    shard = checks.vocab_parallel(vocab_parallel)
    head = checks.linear_inputs(
        "", hidden, lm_head_weight, bias, logit_scale, logit_softcap, sliced=shard is not None
    )
    target = checks.target(target, head.hidden)
    given = checks.token_weight(token_weight, guide, target)
    guide_head, temperature = None, 1.0
    if guide is not None:
        guide_head, temperature = checks.guide_inputs(guide, head.hidden, sliced=shard is not None)
    checks.one_device(head, target, guide_head, given)
    normalizer = checks.normalizer(normalizer, reduction, head.hidden.device)

    trained_weight = None
    if given is not None and given.requires_grad and torch.is_grad_enabled():
        trained_weight = _transformed(given, target != ignore_index, transform, head)
        transform = None
    result = _call(
        head,
        target,
        row_weight=given if trained_weight is None else trained_weight,
        guide=guide_head,
        temperature=temperature,
        self_weight=isinstance(token_weight, str),
        transform=transform or NO_TRANSFORM,
        ignore_index=ignore_index,
        grad=torch.is_grad_enabled(),
        rowwise=reduction == "none",
        mean=reduction == "mean" and normalizer is None,
        asked=asked,
        keep_zero_rows=trained_weight is not None or bool(asked and asked != {"weight"}),
        shard=shard,
        impl=impl,
        chunk_size=chunk_size,
    )
    loss = result.loss
    if reduction == "none":
        loss = loss.reshape(target.shape)
    elif normalizer is not None:
        loss = normalized(loss, normalizer)
    elif reduction == "weighted_mean":
        weight = result.weight if trained_weight is None else trained_weight
        loss = normalized(loss, weight.sum())
    if asked is None:
        return loss
    return loss, _statistics(asked, result, target, ignore_index)


def _transformed(
    weight: Tensor, valid: Tensor, transform: WeightTransform | None, head: LinearInputs
) -> Tensor:
    """Weights that require grad, transformed as the operator transforms those that do not."""
    # Ignored rows are 0 before and after: their weights may be arbitrary, even NaN.
    weight = torch.where(valid, weight.to(accumulation_dtype(head.hidden.dtype)), 0)
    return torch.where(valid, transform_weight(weight, transform), 0)


@overload
def token_confidence(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    vocab_parallel: VocabParallel | None = None,
    ignore_index: int = -100,
    stats: None = None,
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> Tensor: ...
@overload
def token_confidence(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    vocab_parallel: VocabParallel | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic],
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, TokenStats]: ...


@torch.no_grad()
def token_confidence(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    vocab_parallel: VocabParallel | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] | None = None,
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Softmax probability of each target under `hidden @ lm_head_weight.T`; has no gradient.

    Args:
        hidden, lm_head_weight, target, bias, logit_scale, logit_softcap: as in `weighted_ce`.
        temperature: positive, divides the logits after the soft-cap. ignore_index: rows with this
        target are not computed and get confidence 0. stats: names of the `TokenStats` to return as
        well, of the logits divided by the temperature;
            `weight` is 1 on rows that are not ignored.
        vocab_parallel, impl, chunk_size: as in `weighted_ce`.

    Returns:
        Confidence float32 (float64 for float64 inputs) [*B]; with `stats` a pair of the confidence
        and the statistics.

    Raises:
        ValueError, TypeError: naming the argument, as in `weighted_ce`.
    """
    _, ignore_index, chunk_size = checks.options("none", ignore_index, chunk_size)
    asked = checks.statistics(stats)
    shard = checks.vocab_parallel(vocab_parallel)
    head = checks.linear_inputs(
        "", hidden, lm_head_weight, bias, logit_scale, logit_softcap, sliced=shard is not None
    )
    target = checks.target(target, head.hidden)
    checks.one_device(head, target)
    result = _call(
        head,
        target,
        temperature=checks.number("temperature", temperature, "positive number"),
        # The operator's weight is then the confidence.
        self_weight=True,
        ignore_index=ignore_index,
        rowwise=True,
        asked=asked,
        keep_zero_rows=True,
        shard=shard,
        impl=impl,
        chunk_size=chunk_size,
    )
    confidence = result.weight.reshape(target.shape)
    if asked is None:
        return confidence
    found = _statistics(asked, result, target, ignore_index)
    if "confidence" in asked:
        found = found._replace(confidence=confidence)
    if "weight" in asked:
        found = found._replace(weight=(target != ignore_index).to(confidence.dtype))
    return confidence, found


def _call(
    head: LinearInputs,
    target: Tensor,
    *,
    temperature: float,
    ignore_index: int,
    asked: frozenset[str] | None,
    keep_zero_rows: bool,
    shard: VocabParallel | None,
    impl: Impl,
    chunk_size: int | None,
    row_weight: Tensor | None = None,
    guide: LinearInputs | None = None,
    self_weight: bool = False,
    transform: WeightTransform = NO_TRANSFORM,
    grad: bool = False,
    rowwise: bool = False,
    mean: bool = False,
) -> LinearCE:
    """Calls the operator with flat arguments and rows."""
    hidden, lm_head_weight, bias, logit_scale, logit_softcap = head
    no_guide = (None, None, None, 1.0, None)
    guide_hidden, guide_weight, guide_bias, guide_scale, guide_softcap = guide or no_guide
    implementation = resolve_impl(impl, {"hidden": hidden, "guide.hidden": guide_hidden})
    return operator.call(
        _matrix(hidden),
        lm_head_weight,
        bias,
        target.flatten().long(),
        row_weight.flatten() if row_weight is not None else None,
        _matrix(guide_hidden) if guide_hidden is not None else None,
        guide_weight,
        guide_bias,
        logit_scale,
        logit_softcap,
        guide_scale,
        guide_softcap,
        temperature,
        self_weight,
        transform.power,
        transform.floor,
        transform.threshold,
        ignore_index,
        grad and hidden.requires_grad,
        grad and lm_head_weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
        rowwise,
        mean,
        asked is not None and bool(asked & {"lse", "top1", "largest"}),
        asked is not None and "entropy" in asked,
        keep_zero_rows,
        shard.group.group_name if shard is not None else None,
        shard.start if shard is not None else 0,
        implementation,
        chunk_size,
    )


def _matrix(hidden: Tensor) -> Tensor:
    """Hidden states as [N, D]."""
    return hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])


def _statistics(
    asked: frozenset[str], result: LinearCE, target: Tensor, ignore_index: int
) -> TokenStats:
    """The requested statistics, in the shape of the targets."""
    found = {name: getattr(result, name) for name in asked - {"confidence"}}
    if "confidence" in asked:
        valid = target.flatten() != ignore_index
        found["confidence"] = torch.where(valid, torch.exp(-result.nll), 0)
    if "weight" in found:
        found["weight"] = found["weight"].clone()  # the backward reads its own
    return TokenStats(**{name: v.detach().reshape(target.shape) for name, v in found.items()})
