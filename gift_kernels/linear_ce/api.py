"""Per-token weighted linear cross-entropy without the logits.

    loss = Σ_i w_i · (−log softmax(z_i)[y_i]) / normalizer     z = softcap(s · (H Wᵀ + b))

The weights come from a tensor, from a guide model's confidence in the targets found in the same
call, or from the model's own confidence. See `reference.py` for the formulas and their sources.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gift_kernels import dispatch
from gift_kernels.linear_ce.op import linear_ce
from gift_kernels.linear_ce.types import LinearCE, accumulation_dtype
from gift_kernels.reference import (
    Reduction,
    TokenStats,
    normalized,
    reduce_loss,
    transform_weight,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def weighted_ce(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    token_weight: Tensor | Literal["self"] | None = None,
    *,
    guide_hidden: Tensor | None = None,
    guide_lm_head_weight: Tensor | None = None,
    guide_bias: Tensor | None = None,
    guide_logit_scale: float = 1.0,
    guide_logit_softcap: float | None = None,
    guide_temperature: float = 1.0,
    weight_power: float = 1.0,
    weight_floor: float = 0.0,
    weight_threshold: float = 0.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    return_stats: bool = False,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int = 0,
    impl: dispatch.Impl = "auto",
    chunk_size: int | None = None,
) -> Any:
    """Weighted cross-entropy of `hidden @ lm_head_weight.T` against `target`.

    Args:
        hidden: [*B, D], the last hidden states (after the final norm), already aligned with
            `target`: position t predicts `target[t]`. bf16, fp16, fp32 or fp64.
        lm_head_weight: [V, D] of the same dtype and device. Gradients are made only for what
            requires them, so a frozen head costs two matrix products forward and backward.
        target: int64 or int32 [*B], token ids or `ignore_index`.
        token_weight: [*B] weights, for example confidences annotated beforehand; `"self"` for the
            model's own detached confidence (DFT); None for 1, or for the guide's confidence where a
            guide is given. A weight tensor that requires grad receives its gradient.
        guide_hidden, guide_lm_head_weight: [*B, Dg] and [Vg, Dg] of a guide model with the same
            token ids; its softmax confidence in the target becomes the weight, without gradient.
        guide_bias, guide_logit_scale, guide_logit_softcap: options of the guide's head.
        guide_temperature: divides the guide's logits.
        weight_power, weight_floor, weight_threshold: w becomes max(w, floor) ** power, and 0 where
            w < threshold; applied to weights of every origin.
        bias: [V], added to the logits before the scale.
        logit_scale: positive factor of the logits (Cohere's `logit_scale`; Granite divides: pass
            1 / `logits_scaling`).
        logit_softcap: c of c · tanh(z / c), after the scale (Gemma's `final_logit_softcapping`).
        reduction: `none` [*B]; `sum`; `mean`: divided by the number of rows that are not ignored;
            `weighted_mean`: divided by the sum of their weights. An empty `mean` is 0.
        normalizer: replaces the divisor of `mean` and `weighted_mean`, for example the count over a
            global batch. A loss of 0 divided by 0 is 0.
        ignore_index: rows with this target cost nothing and have zero loss and gradient.
        return_stats: also return `TokenStats` of every row, without gradient.
        process_group, vocab_start: for a vocabulary-parallel head: each rank passes its slice of
            the head (and bias, and the guide's), rows [vocab_start, vocab_start + V) of the whole,
            the same hidden states and the same targets; every rank gets the whole loss and the
            whole gradient of `hidden`.
        impl: `eager` (chunked PyTorch), `triton`, or `auto`: Triton on CUDA, eager elsewhere.
        chunk_size: rows of logits the eager implementation holds at once; by default as many as
            fit in 256 MiB.

    Returns:
        The loss, float32 (float64 for float64 inputs): [] or, for `none`, [*B]; with
        `return_stats` a pair of the loss and the statistics.

    Raises:
        ValueError, TypeError: naming the argument. Targets out of range raise on CPU; on CUDA their
            rows become NaN, or raise too when GIFT_KERNELS_CHECK_TARGETS=1.

    A row whose weight is exactly 0 contributes exactly 0 even where its nll is infinite or NaN.
    """
    has_guide = guide_hidden is not None or guide_lm_head_weight is not None
    _check_weighting(token_weight, guide_hidden, guide_lm_head_weight, target)
    _check_options(reduction, normalizer, weight_power, weight_floor, chunk_size)
    for name, value in (
        ("logit_scale", logit_scale),
        ("guide_logit_scale", guide_logit_scale),
        ("guide_temperature", guide_temperature),
        ("logit_softcap", logit_softcap),
        ("guide_logit_softcap", guide_logit_softcap),
    ):
        dispatch.check_positive(name, value)
    hidden, lm_head_weight, bias = dispatch.autocast_head(hidden, lm_head_weight, bias)
    dispatch.check_head("", hidden, lm_head_weight, bias, tuple(target.shape))
    if has_guide:
        assert guide_hidden is not None and guide_lm_head_weight is not None
        guide_hidden, guide_lm_head_weight, guide_bias = (
            tensor.detach() if tensor is not None else None
            for tensor in dispatch.autocast_head(guide_hidden, guide_lm_head_weight, guide_bias)
        )
        assert guide_hidden is not None and guide_lm_head_weight is not None
        dispatch.check_head(
            "guide_", guide_hidden, guide_lm_head_weight, guide_bias, tuple(target.shape)
        )
    dispatch.check_target(target, hidden)
    dispatch.check_shard(process_group, vocab_start)
    given_weight = token_weight if isinstance(token_weight, Tensor) else None
    row_weight = None
    if given_weight is not None:
        dispatch.check_tensor("token_weight", given_weight, tuple(target.shape), target)
        row_weight = transform_weight(
            given_weight.reshape(-1).to(accumulation_dtype(hidden.dtype)),
            weight_power,
            weight_floor,
            weight_threshold,
        )
    grad = torch.is_grad_enabled()
    weight_grad = grad and row_weight is not None and row_weight.requires_grad
    flat_target = target.reshape(-1).long()
    result = LinearCE(
        *linear_ce(
            hidden.reshape(-1, hidden.shape[-1]),
            lm_head_weight,
            bias,
            flat_target,
            row_weight if reduction != "none" or row_weight is None else row_weight.detach(),
            guide_hidden.reshape(-1, guide_hidden.shape[-1]) if guide_hidden is not None else None,
            guide_lm_head_weight,
            guide_bias,
            logit_scale,
            logit_softcap,
            guide_logit_scale,
            guide_logit_softcap,
            guide_temperature if has_guide else 1.0,
            isinstance(token_weight, str),
            weight_power,
            weight_floor,
            weight_threshold,
            ignore_index,
            grad and hidden.requires_grad,
            grad and lm_head_weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
            reduction == "none",
            return_stats,
            return_stats or weight_grad,
            process_group.group_name if process_group is not None else None,
            vocab_start,
            dispatch.resolve_impl(impl, hidden),
            chunk_size,
        )
    )
    kept = flat_target != ignore_index
    weight = result.weight.detach()
    if row_weight is not None:
        weight = torch.where(kept, row_weight, 0).to(result.nll.dtype)
    if reduction == "none":
        loss = reduce_loss(result.nll, weight, kept, "none").reshape(target.shape)
    else:
        loss = normalized(result.total, weight, kept, reduction, normalizer)
    if not return_stats:
        return loss
    stats = (value.detach().reshape(target.shape) for value in _stats(result, kept, weight))
    return loss, TokenStats(*stats)


def _stats(result: LinearCE, kept: Tensor, weight: Tensor) -> TokenStats:
    return TokenStats(
        nll=result.nll,
        confidence=torch.where(kept, torch.exp(-result.nll), 0),
        lse=result.lse,
        entropy=result.entropy,
        top1=result.top1,
        weight=weight,
    )


def _check_weighting(
    token_weight: Tensor | str | None,
    guide_hidden: Tensor | None,
    guide_lm_head_weight: Tensor | None,
    target: Tensor,
) -> None:
    if (guide_hidden is None) != (guide_lm_head_weight is None):
        raise ValueError("guide_hidden and guide_lm_head_weight: pass both or neither")
    if isinstance(token_weight, str) and token_weight != "self":
        raise ValueError(f'token_weight: expected a tensor, "self" or None, got {token_weight!r}')
    if token_weight is not None and guide_hidden is not None:
        raise ValueError(
            "token_weight and guide_hidden: both give the weights; pass one of them "
            "(for a product, compute the guide's part with token_confidence)"
        )
    if isinstance(token_weight, Tensor) and not token_weight.dtype.is_floating_point:
        raise TypeError(f"token_weight: expected a floating-point dtype, got {token_weight.dtype}")


def _check_options(
    reduction: str,
    normalizer: Tensor | float | None,
    power: float,
    floor: float,
    chunk_size: int | None,
) -> None:
    if reduction not in ("none", "sum", "mean", "weighted_mean"):
        raise ValueError(
            f'reduction: expected "none", "sum", "mean" or "weighted_mean", got {reduction!r}'
        )
    if normalizer is not None and reduction not in ("mean", "weighted_mean"):
        raise ValueError(
            f"normalizer: only divides the reductions mean and weighted_mean, not {reduction}"
        )
    if isinstance(normalizer, Tensor):
        dispatch.check_plain("normalizer", normalizer)
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected one number, got a tensor of shape {list(normalizer.shape)}"
            )
    if power < 0 or floor < 0:
        raise ValueError(
            f"weight_power and weight_floor: expected values >= 0, got {power} and {floor}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
