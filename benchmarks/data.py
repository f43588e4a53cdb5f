"""Inputs whose softmax looks like a trained language model's, and flat ones.

Peaked: token ids are frequency ranks (BPE merges come roughly in that order) and targets follow
Zipf's law, p ∝ 1 / (rank + 2.7). A tail of logits with spread TAIL_STD around −PRIOR·ln(rank + 3)
represents the vocabulary at large; the logits of each row's target and of RIVALS other likely
tokens are raised above it so that the target gets the confidence drawn for it. Confidences of the
guide mix three kinds of tokens: near-certain, undecided and surprising. The model's own are the
same, sharpened or blunted by a factor per row.

Flat: independent Gaussian hidden states and head, uniform targets. Unlike real training, but what
most benchmarks use.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import MATRICES, CECase, MergeCase

TAIL_STD = 1.5
PRIOR = 0.5
RIVALS = 6
SHARES = (0.65, 0.25, 0.10)  # near-certain, undecided, surprising


@dataclass
class CEInputs:
    """hidden [N, D], weight [V, D], target int64 [N], token_weight float32 [N], the guide's too."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    token_weight: Tensor
    guide_hidden: Tensor | None
    guide_weight: Tensor | None
    upstream: Tensor

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if value is not None]


@dataclass
class MergeInputs:
    """weight [M, K], lora_a [R, K], lora_b [M, R] and the factor of their product."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.lora_a, self.lora_b]


def make_inputs(case: CECase | MergeCase, device: torch.device, seed: int = 0):
    """Inputs of a case, the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(case, MergeCase):
        return make_merge_inputs(case, generator)
    return make_ce_inputs(case, generator)


def make_merge_inputs(case: MergeCase, generator: torch.Generator) -> MergeInputs:
    """Weights of spread 0.02 and factors whose product changes them by about one percent."""
    rows, columns = MATRICES[case.head]
    device = generator.device
    spread = math.sqrt(0.01 * 0.02 / math.sqrt(case.rank))
    factor_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.factor_dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return MergeInputs(
        weight=(0.02 * normal(rows, columns)).to(case.torch_dtype),
        lora_a=(spread * normal(case.rank, columns)).to(factor_dtype),
        lora_b=(spread * normal(rows, case.rank)).to(factor_dtype),
        scale=2.0,
    )


def make_ce_inputs(case: CECase, generator: torch.Generator) -> CEInputs:
    """Hidden states, head and targets of `case.data`; leaves that require grad as the case says."""
    device, count = generator.device, case.tokens
    if case.data == "flat":
        target = torch.randint(case.shape.vocab, (count,), generator=generator, device=device)
        guide_confidence = torch.rand(count, generator=generator, device=device)
        own = None
    else:
        target = draw_zipf(case.shape.vocab, count, generator)
        guide_confidence = draw_confidence(count, generator)
        sharpness = torch.rand(count, generator=generator, device=device) * 2 - 1
        own = guide_confidence ** (2**sharpness)
    hidden, weight = make_head(case, target, own, generator)
    guide_hidden = guide_weight = None
    if case.weighting == "guide":
        confidence = None if own is None else guide_confidence
        guide_hidden, guide_weight = make_head(case, target, confidence, generator)
    learns = case.op == "weighted_ce" and case.direction != "forward"
    return CEInputs(
        hidden=hidden.requires_grad_(learns),
        weight=weight.requires_grad_(learns and case.trainable),
        target=target,
        token_weight=guide_confidence,
        guide_hidden=guide_hidden,
        guide_weight=guide_weight,
        upstream=torch.ones((), device=device),
    )


def make_head(
    case: CECase, target: Tensor, confidence: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """hidden [N, D] and head [V, D] that give the targets about `confidence` [N]; None is flat."""
    shape, device = case.shape, generator.device

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.vocab, shape.hidden).mul_(shape.hidden**-0.5)
    if confidence is None:
        return normal(len(target), shape.hidden).to(case.torch_dtype), weight.to(case.torch_dtype)
    ranks = torch.arange(shape.vocab, device=device)
    prior = -PRIOR * torch.log(ranks + 3.0)
    prior -= prior.mean()
    # The first coordinate carries the prior of the vocabulary: its hidden state is a constant.
    level = float(prior.std()) * math.sqrt(shape.hidden)
    weight[:, 0] = prior / level
    hidden = normal(len(target), shape.hidden).mul_(TAIL_STD)
    hidden[:, 0] = level
    tail = float(torch.logsumexp(prior, 0)) + TAIL_STD**2 / 2
    rivals = draw_zipf(shape.vocab, len(target) * RIVALS, generator).reshape(-1, RIVALS)
    share = torch.rand(rivals.shape, generator=generator, device=device) ** 3 + 1e-3
    share = share / share.sum(1, keepdim=True)
    rest = (1 - confidence).clamp(min=1e-6)
    total = tail - torch.log(0.1 * rest)  # the tail holds a tenth of what the target leaves
    wanted = torch.log(torch.cat([confidence.unsqueeze(1), 0.9 * rest.unsqueeze(1) * share], 1))
    wanted = wanted + total.unsqueeze(1)  # logits [N, 1 + RIVALS] before the soft-cap
    if shape.softcap is not None:
        wanted = shape.softcap * torch.atanh((wanted / shape.softcap).clamp(-0.99, 0.99))
    tokens = torch.cat([target.unsqueeze(1), rivals], 1)
    for column in range(tokens.shape[1]):
        direction = weight[tokens[:, column]].clone()
        direction[:, 0] = 0
        present = (hidden * weight[tokens[:, column]]).sum(1)
        lift = (wanted[:, column] - present) / direction.square().sum(1).clamp(min=1e-6)
        # The target is lifted first; rivals that repeat it would lower it again.
        lift = torch.where((column > 0) & (tokens[:, column] == target), 0, lift)
        hidden += lift.unsqueeze(1) * direction
    return hidden.to(case.torch_dtype), weight.to(case.torch_dtype)


def draw_zipf(vocab: int, count: int, generator: torch.Generator) -> Tensor:
    """Token ids int64 [count] with p ∝ 1 / (rank + 2.7), the id being the rank."""
    ranks = torch.arange(vocab, device=generator.device, dtype=torch.float64)
    cumulative = torch.cumsum(1 / (ranks + 2.7), 0)
    draws = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.searchsorted(cumulative, draws * cumulative[-1]).clamp_(max=vocab - 1)


def draw_confidence(count: int, generator: torch.Generator) -> Tensor:
    """Confidences float32 [count]: SHARES of near-certain, undecided and surprising tokens."""

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device)

    kind, depth = uniform(), uniform()
    certain = 1 - 10 ** (-1 - 3 * depth)  # 0.9 to 0.9999
    undecided = 0.1 + 0.8 * depth
    surprising = 10 ** (-1 - 4 * depth)  # 0.1 to 0.00001
    chosen = torch.where(kind < SHARES[0], certain, undecided)
    return torch.where(kind > 1 - SHARES[2], surprising, chosen)


@torch.no_grad()
def describe_inputs(case: CECase, inputs: CEInputs, rows: int = 1024) -> dict[str, float]:
    """Mean entropy (nats), mean and quantiles of the model's confidence, over the first rows."""
    from gift_kernels import token_confidence

    q, stats = token_confidence(
        inputs.hidden[:rows].detach(),
        inputs.weight.detach(),
        inputs.target[:rows],
        logit_softcap=case.shape.softcap,
        stats=("entropy", "top1"),
        impl="eager",
    )
    assert stats.entropy is not None and stats.top1 is not None
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], device=q.device)
    quantiles = torch.quantile(q, levels).tolist()
    names = ("q_p10", "q_p25", "q_p50", "q_p75", "q_p90")
    return {
        "entropy": float(stats.entropy.mean()),
        "q_mean": float(q.mean()),
        **dict(zip(names, quantiles, strict=True)),
        "top1": float(stats.top1.float().mean()),
    }
