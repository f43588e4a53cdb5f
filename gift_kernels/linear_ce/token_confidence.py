"""The confidence a model has in given tokens, from hidden states, without the logits.

    q_i = softmax(softcap(s · (H Wᵀ + b)) / T)[i, y_i]

One matrix product; see `reference.py` for the formula and its source.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gift_kernels import dispatch
from gift_kernels.linear_ce.op import linear_ce
from gift_kernels.linear_ce.types import LinearCE
from gift_kernels.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    ignore_index: int = -100,
    return_stats: bool = False,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int = 0,
    impl: dispatch.Impl = "auto",
    chunk_size: int | None = None,
) -> Any:
    """Softmax probability of each target under `hidden @ lm_head_weight.T`; has no gradient.

    Args:
        hidden: [*B, D], aligned with `target`; bf16, fp16, fp32 or fp64.
        lm_head_weight: [V, D] of the same dtype and device.
        target: int64 or int32 [*B], token ids or `ignore_index`.
        bias: [V], added to the logits before the scale.
        logit_scale, logit_softcap: as in `weighted_ce`.
        temperature: divides the logits, after the soft-cap.
        ignore_index: rows with this target cost nothing and get confidence 0.
        return_stats: return `TokenStats` (nll, confidence, lse, entropy, top-1 hit) instead.
        process_group, vocab_start, impl, chunk_size: as in `weighted_ce`.

    Returns:
        Confidence float32 (float64 for float64 inputs) [*B], or `TokenStats` of that shape, whose
        `weight` is 1 on rows that count.

    Raises:
        ValueError, TypeError: naming the argument, as in `weighted_ce`.
    """
    dispatch.check_positive("logit_scale", logit_scale)
    dispatch.check_positive("temperature", temperature)
    dispatch.check_positive("logit_softcap", logit_softcap)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    hidden, lm_head_weight, bias = dispatch.autocast_head(hidden, lm_head_weight, bias)
    dispatch.check_head("", hidden, lm_head_weight, bias, tuple(target.shape))
    dispatch.check_target(target, hidden)
    dispatch.check_shard(process_group, vocab_start)
    flat_target = target.reshape(-1).long()
    result = LinearCE(
        *linear_ce(
            hidden.reshape(-1, hidden.shape[-1]),
            lm_head_weight,
            bias,
            flat_target,
            None,
            None,
            None,
            None,
            logit_scale,
            logit_softcap,
            1.0,
            None,
            temperature,
            False,
            1.0,
            0.0,
            0.0,
            ignore_index,
            False,
            False,
            False,
            False,
            return_stats,
            True,
            process_group.group_name if process_group is not None else None,
            vocab_start,
            dispatch.resolve_impl(impl, hidden),
            chunk_size,
        )
    )
    kept = flat_target != ignore_index
    confidence = torch.where(kept, torch.exp(-result.nll), 0).reshape(target.shape)
    if not return_stats:
        return confidence
    return TokenStats(
        nll=result.nll.reshape(target.shape),
        confidence=confidence,
        lse=result.lse.reshape(target.shape),
        entropy=result.entropy.reshape(target.shape),
        top1=result.top1.reshape(target.shape),
        weight=kept.reshape(target.shape).to(confidence.dtype),
    )
