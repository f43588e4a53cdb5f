"""The weight of each target token in the loss, in plain PyTorch: `token_weights` is the place to
change or to add one.

The loss asks the kernels for each token's nll and for STATISTICS, forms the weights here without
gradient, and adds up weight times nll.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gift.config import TrainOptions
from gift.data import Example
from gift.errors import InputError
from gift_kernels import TokenStats, WeightTransform
from gift_kernels.linear_ce.types import Statistic
from gift_kernels.reference import transform_weight

# What `token_weights` reads of the trained model; to weight by its entropy, add "entropy".
STATISTICS: tuple[Statistic, ...] = ("confidence",)


@dataclass(frozen=True)
class GuidedRow:
    """One row for the loss: its example, and the guide's confidences float32 [targets] if any."""

    example: Example
    confidence: Tensor | None


def check_weighting(config: TrainOptions) -> None:
    """InputError where options would change confidences and the weighting has none."""
    for name in ("confidence_floor", "confidence_power", "confidence_threshold"):
        is_given = getattr(config, name) != TrainOptions.model_fields[name].default
        if config.weighting == "uniform" and is_given:
            raise InputError(
                f"--{name.replace('_', '-')}: --weighting uniform has no confidence to change; "
                "leave it out, or choose another --weighting"
            )


def token_weights(
    config: TrainOptions, own: TokenStats, guide: Tensor | None, turn_ends: Tensor
) -> Tensor:
    """Weights float32 [N] of N target tokens, transformed as the options say.

    `own` has the trained model's STATISTICS [N], `guide` the annotated confidences [N] (None
    without a store), `turn_ends` is True [N] on the last token of each turn.
    """
    q, transform = own.confidence, _transform(config)
    assert q is not None
    match config.weighting:
        case "uniform":  # plain SFT; on the base model Shadow-FT, arXiv 2505.12716
            weight = torch.ones_like(q)
        case "self":  # DFT, arXiv 2508.05629
            weight = transform_weight(q, transform)
        case "guide":  # GIFT, ACL 2026, arXiv 2605.01256
            assert guide is not None
            weight = transform_weight(guide, transform)
        case "own-times-guide":  # the product of the two, for what both models hold likely
            assert guide is not None
            weight = transform_weight(q * guide, transform)
    if config.end_weight is not None:
        weight = torch.where(turn_ends, config.end_weight, weight)
    return weight


def known_zeros(config: TrainOptions, guide: Tensor | None, turn_ends: Tensor) -> Tensor:
    """Where bool [N] `token_weights` is 0 whatever the trained model says.

    These targets are left out of the loss's matrix products.
    """
    zero = torch.zeros_like(turn_ends)
    if config.guided:
        # With q <= 1 too: q · guide is not above the guide's, and the transform keeps their order.
        assert guide is not None
        zero = transform_weight(guide, _transform(config)) == 0
    if config.end_weight is not None:
        zero = torch.where(turn_ends, config.end_weight == 0, zero)
    return zero


def guide_confidence(rows: Sequence[GuidedRow]) -> Tensor | None:
    """The annotated confidences float32 [N] of the rows' targets; None without a store."""
    given = [row.confidence for row in rows if row.confidence is not None]
    return torch.cat(given) if given else None


def find_turn_ends(examples: Sequence[Example]) -> Tensor:
    """Which targets bool [N] of the examples are the last of their turn."""
    ends = []
    for example in examples:
        following = np.append(example.is_target[1:], False)
        ends.append(~following[example.is_target])
    return torch.from_numpy(np.concatenate(ends))


def _transform(config: TrainOptions) -> WeightTransform:
    return WeightTransform(
        power=config.confidence_power,
        floor=config.confidence_floor,
        threshold=config.confidence_threshold,
    )
