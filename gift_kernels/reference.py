"""Specification of every operation: direct formulas in plain PyTorch, with full logits.

    z = softcap(s · (H Wᵀ + b))            softcap(x) = c · tanh(x / c), identity when c is None
    m_i = max_v z_iv     nll_i = log Σ_v exp(z_iv − m_i) − (z_i,y_i − m_i)     q_i = exp(−nll_i)
    loss = Σ_i w_i · nll_i / normalizer

Letters: N tokens, D hidden, V vocabulary, R LoRA rank, K in, M out. Every function computes in the
dtype of its inputs, so float64 inputs give the reference values for the implementations.

Source of the weighted loss: GIFT, ACL 2026 (arXiv 2605.01256); of `token_weight="self"`: DFT
(arXiv 2508.05629); of the merge: LoRA (arXiv 2106.09685).
"""

from typing import Literal

import torch
from torch import Tensor

from gift_kernels.linear_ce.types import Guide, Reduction, TokenStats, WeightTransform


def head_logits(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Logits [*B, V] of hidden states [*B, D] under a head [V, D]."""
    logits = hidden @ lm_head_weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits


def token_stats(
    logits: Tensor, target: Tensor, ignore_index: int = -100, temperature: float = 1.0
) -> TokenStats:
    """Statistics of logits [*B, V] / temperature for targets [*B]; differentiable in the logits.

    The row's largest logit m is subtracted first, so that a common offset of all logits costs no
    accuracy; the target's own term is kept out of the sum. With r = Σ_{v≠y} exp(z_v
    − m), nll is log1p(r) where the target is the largest, else log(r + exp(z_y − m)) − (z_y − m).
    """
    valid = target != ignore_index
    column = torch.where(valid, target, 0).unsqueeze(-1)
    target_logit = logits.gather(-1, column)
    largest = logits.amax(-1, keepdim=True)
    # With a logit of +inf the softmax is undefined: return NaN, not a confidence of 0.
    largest = torch.where(largest == torch.inf, torch.nan, largest)
    top1 = target_logit >= largest
    # Where the target is the largest, r depends on it through m; elsewhere m cancels.
    m = torch.where(top1, target_logit, largest.detach())
    shifted = (logits - m) / temperature
    gap = shifted.gather(-1, column)
    others = torch.exp(shifted.scatter(-1, column, -torch.inf))
    rest = others.sum(-1, keepdim=True)
    log_total = torch.where(top1, torch.log1p(rest), torch.log(rest + torch.exp(gap)))
    nll = (log_total - gap).squeeze(-1)
    lse = (log_total + m / temperature).squeeze(-1)
    total = rest + torch.exp(gap)
    moment = torch.where(others > 0, others * shifted, 0).sum(-1, keepdim=True)
    moment = moment + torch.where(gap > -torch.inf, torch.exp(gap) * gap, 0)
    # Terms of exactly 1 are counted separately, so that the small ones are not rounded away.
    ones = (others == 1).sum(-1, keepdim=True)
    small = torch.where(others == 1, 0, others).sum(-1, keepdim=True)
    excess = torch.where(top1, small + ones, small + torch.exp(gap) + (ones - 1))
    entropy = (torch.log1p(excess) - moment / total).squeeze(-1)
    zero = torch.zeros_like(nll)
    return TokenStats(
        nll=torch.where(valid, nll, zero),
        confidence=torch.where(valid, torch.exp(-nll), zero),
        lse=torch.where(valid, lse, zero),
        entropy=torch.where(valid, entropy, zero),
        top1=valid & top1.squeeze(-1),
        largest=torch.where(valid, torch.exp(shifted.amax(-1) - log_total.squeeze(-1)), zero),
        weight=valid.to(nll.dtype),
    )


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
) -> TokenStats:
    """Statistics of softmax(z / temperature); see `gift_kernels.linear_ce.api`."""
    logits = head_logits(hidden, lm_head_weight, bias, logit_scale, logit_softcap)
    return token_stats(logits, target, ignore_index, temperature)


def transform_weight(weight: Tensor, transform: WeightTransform | None) -> Tensor:
    """max(w, floor) ** power, and 0 where w < threshold; unchanged if `transform` is None.

    No gradient where w <= floor or w < threshold.
    """
    if transform is None:
        return weight
    # Select before the power: at w = 0 a square root's gradient is infinite, and 0 · ∞ is NaN.
    fixed = (weight <= transform.floor) | (weight < transform.threshold)
    transformed = torch.where(fixed, transform.floor, weight) ** transform.power
    return torch.where(weight < transform.threshold, 0, transformed)


def reduce_loss(
    nll: Tensor,
    weight: Tensor,
    valid: Tensor,
    reduction: Reduction,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Weighted sum of nll [*B] over valid rows, divided as `reduction` says.

    A row of weight exactly 0 contributes exactly 0, even where its nll is infinite or NaN.
    """
    counted = torch.where((weight != 0) | nll.isfinite(), nll, 0)
    rows = torch.where(valid, weight * counted, 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if normalizer is None:
        normalizer = valid.sum() if reduction == "mean" else torch.where(valid, weight, 0).sum()
    return normalized(rows.sum(), normalizer)


def normalized(total: Tensor, normalizer: Tensor | float) -> Tensor:
    """A sum of losses divided by one number; 0 / 0 is 0, the loss of an empty batch."""
    if not isinstance(normalizer, Tensor):
        return total / (normalizer or (total == 0).to(total.dtype))
    normalizer = normalizer.to(total.dtype).reshape(())
    # Added rather than selected with `where`, which would copy a CPU normalizer to the GPU and
    # synchronize.
    return total / (normalizer + ((total == 0) & (normalizer == 0)).to(total.dtype))


def weighted_ce(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    token_weight: Tensor | Literal["self"] | None = None,
    *,
    guide: Guide | None = None,
    transform: WeightTransform | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, TokenStats]:
    """Loss and all statistics; see `gift_kernels.linear_ce.api`."""
    valid = target != ignore_index
    logits = head_logits(hidden, lm_head_weight, bias, logit_scale, logit_softcap)
    stats = token_stats(logits, target, ignore_index)
    nll, confidence = stats.nll, stats.confidence
    assert nll is not None and confidence is not None
    if guide is not None:
        guide_stats = token_confidence(
            guide.hidden,
            guide.lm_head_weight,
            target,
            bias=guide.bias,
            logit_scale=guide.logit_scale,
            logit_softcap=guide.logit_softcap,
            temperature=guide.temperature,
            ignore_index=ignore_index,
        )
        assert guide_stats.confidence is not None
        weight = guide_stats.confidence.detach()
    elif isinstance(token_weight, str):
        weight = confidence.detach()
    elif token_weight is not None:
        weight = token_weight.to(nll.dtype)
    else:
        weight = torch.ones_like(nll)
    weight = torch.where(valid, transform_weight(weight, transform), 0)
    loss = reduce_loss(nll, weight, valid, reduction, normalizer)
    stats = TokenStats(*(value.detach() for value in stats if value is not None))
    return loss, stats._replace(weight=weight.detach())


def lora_merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W [M, K] + scale · B [M, R] @ A [R, K], in the dtype of the inputs."""
    return weight + scale * (lora_b @ lora_a)
