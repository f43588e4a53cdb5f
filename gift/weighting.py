"""The weight of each target token in the loss, in plain PyTorch: change or add a weighting in
`token_weights`.

The loss asks the kernels for each token's nll and for STATISTICS, forms the weights here without
gradient, and adds up weight times nll. Weights that do not depend on the trained model
(`--weighting guide`, `--control`) are formed once before training, by `guided_rows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gift.config import TrainOptions
from gift.controls import controlled_weights
from gift.data.batches import copy_to
from gift.data.encoding import Example
from gift.errors import InputError
from gift_kernels import TokenStats, WeightTransform
from gift_kernels.linear_ce.types import Statistic
from gift_kernels.reference import transform_weight

# Statistics of the trained model that `token_weights` needs, by weighting.
STATISTICS: dict[str, tuple[Statistic, ...]] = {
    "uniform": (),
    "self": ("confidence",),
    "guide": (),
    "own-times-guide": ("confidence",),
    "excess": ("nll",),
    "entropy": ("entropy",),
}
# A sentence each for a study's report.
ABOUT = {
    "guide": "A token weighs as much as the guide is confident in it (GIFT, arXiv 2605.01256).",
    "uniform": "Every token weighs 1, as in plain fine-tuning; with the base model trained this is "
    "Shadow-FT (arXiv 2505.12716).",
    "self": "The trained model's own confidence in the token (DFT, arXiv 2508.05629).",
    "own-times-guide": "The trained model's confidence times the guide's.",
    "excess": "1 for the share of each row's tokens that the trained model finds hardest compared "
    "with the guide, 0 for the others (Rho-1, arXiv 2404.07965).",
    "entropy": "A token weighs more the less sure the trained model is there of any token "
    "(EAFT, arXiv 2601.02151).",
}
# Options that a weighting does not read, by weighting.
UNREAD = {
    "uniform": ("confidence_level", "confidence_floor", "confidence_power", "confidence_threshold"),
    "excess": ("confidence_level", "confidence_power", "confidence_threshold"),
}
# EAFT divides the entropy of the 20 likeliest tokens, an approximation, by its maximum.
ENTROPY_SCALE = log(20)


@dataclass(frozen=True)
class GuidedRow:
    """One row for the loss. Of its targets, all [targets]:

    the guide's confidence float32 if any, the weight float32 under `--weighting guide`, and the
    index int64 of the first target with which it shares a confidence.
    """

    example: Example
    confidence: Tensor | None
    weight: Tensor | None
    span: Tensor


class Targets(NamedTuple):
    """Values of N target tokens that do not depend on the trained model, all [N].

    `guide` has the annotated confidences float32 (None without a store), `guide_weight` the weights
    float32 of `--weighting guide` (None under another), `turn_ends` is True on the last token of
    each turn. `row` and `span` int64 are the indices of the first target of the row, and of the
    span of targets that share one confidence.
    """

    guide: Tensor | None
    guide_weight: Tensor | None
    turn_ends: Tensor
    row: Tensor
    span: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return Targets(*(None if tensor is None else copy_to(tensor, device) for tensor in self))  # pyright: ignore


def check_weighting(config: TrainOptions) -> None:
    """InputError where an option would change what the weighting does not have."""
    fields = TrainOptions.model_fields
    for name in UNREAD.get(config.weighting, ()):
        if getattr(config, name) != fields[name].default:
            raise InputError(
                f"--{name.replace('_', '-')}: --weighting {config.weighting} has no confidence to "
                "change; leave it out, or choose another --weighting"
            )
    if config.excess_share != fields["excess_share"].default and config.weighting != "excess":
        raise InputError(
            f"--excess-share: --weighting {config.weighting} has none; leave it out, or choose "
            "--weighting excess"
        )
    if config.control is not None and config.weighting != "guide":
        raise InputError(
            f"--control: --weighting {config.weighting} is not formed of the guide's confidences "
            "alone; a control needs --weighting guide"
        )
    if config.control == "shuffle" and config.confidence_level == "sequence":
        raise InputError(
            "--control: with --confidence-level sequence a response's tokens have one confidence, "
            "and to shuffle them changes nothing; choose --control random"
        )


def refuse_all_zero(config: TrainOptions, rows: Sequence[GuidedRow]) -> None:
    """InputError where every weight is known to be 0, so that nothing would be learned."""
    if all(bool(known_zeros(config, gather_targets([row])).all()) for row in rows):
        raise InputError(
            f"every weight of the data is 0 (--weighting {config.weighting}, "
            f"--confidence-threshold {config.confidence_threshold:g}), so that nothing would be "
            "learned; lower --confidence-threshold, or give other confidences"
        )


def token_weights(config: TrainOptions, own: TokenStats, targets: Targets) -> Tensor:
    """Weights float32 [N] of N target tokens, as the options say.

    `own` has the trained model's STATISTICS of the weighting, [N].
    """
    p, guide = own.confidence, targets.guide
    if config.weighting == "uniform":  # plain SFT; on the base model Shadow-FT, arXiv 2505.12716
        weight = torch.ones(len(targets.row), device=targets.row.device)
    elif config.weighting == "guide":  # GIFT, ACL 2026, arXiv 2605.01256
        assert targets.guide_weight is not None
        weight = targets.guide_weight
    else:
        match config.weighting:
            case "self":  # DFT, arXiv 2508.05629
                assert p is not None
                raw = p
            case "own-times-guide":  # large only where both models are confident
                assert p is not None and guide is not None
                raw = p * guide
            case "excess":  # own loss above the guide's, 1 on the largest: Rho-1, arXiv 2404.07965
                assert own.nll is not None and guide is not None
                # ∞ − ∞ where both models give the token probability 0: such tokens come last.
                excess = (own.nll + torch.log(guide)).nan_to_num(-torch.inf)
                raw = _top_share(config, excess, targets)
            case "entropy":  # own entropy over its scale, at most 1: EAFT, arXiv 2601.02151
                assert own.entropy is not None
                raw = (own.entropy / ENTROPY_SCALE).clamp(max=1)
        weight = transform_weight(_shared(config, raw, targets.span), _transform(config))
    if config.end_weight is not None:
        weight = torch.where(targets.turn_ends, config.end_weight, weight)
    return weight


def known_zeros(config: TrainOptions, targets: Targets) -> Tensor:
    """Where `token_weights` is 0 for any trained model, bool [N].

    These targets are left out of the loss's matrix products.
    """
    zero = torch.zeros_like(targets.turn_ends)
    if config.weighting == "guide":
        assert targets.guide_weight is not None
        zero = targets.guide_weight == 0
    elif config.weighting == "own-times-guide":
        # p · guide <= guide, and mean and transform are monotonic.
        assert targets.guide is not None
        shared = _shared(config, targets.guide, targets.span)
        zero = transform_weight(shared, _transform(config)) == 0
    if config.end_weight is not None:
        zero = torch.where(targets.turn_ends, config.end_weight == 0, zero)
    return zero


def guided_rows(
    config: TrainOptions,
    examples: Sequence[Example],
    confidence: Sequence[Tensor] | None,
    line_starts: Sequence[np.ndarray] | None = None,
) -> list[GuidedRow]:
    """The rows for the loss.

    Args:
        confidence: float32 [targets] by example, None without a store.
        line_starts: for `--confidence-level step`, what `lines.line_starts` finds.
    """
    lines = line_starts or [None] * len(examples)
    spans = [_span(config, *pair) for pair in zip(examples, lines, strict=True)]
    weights: Sequence[Tensor | None] = [None] * len(examples)
    if config.weighting == "guide":
        assert confidence is not None
        shared = [_shared(config, q, span) for q, span in zip(confidence, spans, strict=True)]
        weights = _guide_weights(config, examples, shared)
    return [
        GuidedRow(example, confidence[number] if confidence else None, weights[number], span)
        for number, (example, span) in enumerate(zip(examples, spans, strict=True))
    ]


def gather_targets(rows: Sequence[GuidedRow]) -> Targets:
    """The targets of some rows, one row after the other."""
    sizes = torch.tensor([row.example.targets for row in rows])
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    given = [row.confidence for row in rows if row.confidence is not None]
    weights = [row.weight for row in rows if row.weight is not None]
    return Targets(
        guide=torch.cat(given) if given else None,
        guide_weight=torch.cat(weights) if weights else None,
        turn_ends=torch.cat([find_turn_ends(row.example) for row in rows]),
        row=starts,
        span=starts + torch.cat([row.span for row in rows]),
    )


def find_turn_ends(example: Example) -> Tensor:
    """Which targets bool [targets] of the example are the last of their turn."""
    following = np.append(example.is_target[1:], False)
    return torch.from_numpy(~following[example.is_target])


def _guide_weights(
    config: TrainOptions, examples: Sequence[Example], confidence: Sequence[Tensor]
) -> list[Tensor]:
    transform = _transform(config)
    if config.control is None:
        return [transform_weight(q, transform) for q in confidence]
    # Tokens of a fixed weight are left out of the control.
    free = [
        torch.ones(len(q), dtype=torch.bool)
        if config.end_weight is None
        else ~find_turn_ends(example)
        for q, example in zip(confidence, examples, strict=True)
    ]
    rows = [example.row for example in examples]
    return controlled_weights(config.control, config.seed, rows, confidence, free, transform)


def _span(config: TrainOptions, example: Example, line_starts: np.ndarray | None) -> Tensor:
    """Index int64 [targets] of the first target whose confidence is averaged with this one's."""
    begins = np.ones(example.targets, bool)
    if config.confidence_level != "token":
        ends = find_turn_ends(example).numpy()
        begins = np.append(True, ends[:-1])
        if config.confidence_level == "step":
            assert line_starts is not None
            begins |= line_starts
        if config.end_weight is not None:
            begins |= ends
    indices = np.where(begins, np.arange(len(begins)), 0)
    return torch.from_numpy(np.maximum.accumulate(indices))


def _shared(config: TrainOptions, values: Tensor, span: Tensor) -> Tensor:
    """The mean of the values [N] over each span, repeated on its tokens [N]."""
    if config.confidence_level == "token":
        return values
    sums = torch.zeros_like(values, dtype=torch.float64).index_add_(0, span, values.double())
    counts = torch.zeros_like(sums).index_add_(0, span, torch.ones_like(sums))
    return (sums[span] / counts[span]).to(values.dtype)


def _top_share(config: TrainOptions, score: Tensor, targets: Targets) -> Tensor:
    """1 on the share of each row's tokens with the largest scores [N], at least one; else 0.

    Half a token rounds up. Of equal scores the earlier token comes first. Tokens of a fixed weight
    are left out.
    """
    counts = torch.ones_like(score, dtype=torch.float64)
    if config.end_weight is not None:
        counts = (~targets.turn_ends).double()
        score = torch.where(targets.turn_ends, -torch.inf, score)
    by_score = score.argsort(descending=True, stable=True)
    # Sorted by row, then by score: a row's tokens keep the row's indices.
    order = by_score[targets.row[by_score].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - targets.row
    size = torch.zeros_like(counts).index_add_(0, targets.row, counts)[targets.row]
    # 0.29 · 50 is a little less than 14.5 in floating point.
    chosen = (config.excess_share * size + 0.5 + 1e-9).floor().clamp(min=1)
    return (rank < chosen).to(score.dtype)


def _transform(config: TrainOptions) -> WeightTransform:
    return WeightTransform(
        power=config.confidence_power,
        floor=config.confidence_floor,
        threshold=config.confidence_threshold,
    )
