"""What weight each target token gets in the loss.

`guide` is the annotated confidence of GIFT (ACL 2026, arXiv 2605.01256), `uniform` is 1, `self` is
DFT's own confidence (arXiv 2508.05629), which the loss finds itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gift.confidence_store import ConfidenceStore
from gift.config import TrainOptions
from gift.data import EncodedData, Example
from gift.errors import InputError
from gift_kernels import WeightTransform
from gift_kernels.reference import transform_weight


@dataclass(frozen=True)
class WeightedRow:
    """One row ready for the loss: its example, weights and guide confidences float32 [targets]."""

    example: Example
    weight: Tensor | None
    confidence: Tensor | None


def weighted_rows(
    config: TrainOptions, data: EncodedData, store: ConfidenceStore | None
) -> list[WeightedRow]:
    """All kept rows with their weights, transformed as the options say."""
    if config.weighting == "self" and config.end_weight is not None:
        raise InputError("--end-weight: not available with --weighting self")
    for name in ("confidence_floor", "confidence_power", "confidence_threshold"):
        is_given = getattr(config, name) != TrainOptions.model_fields[name].default
        if config.weighting == "uniform" and is_given:
            raise InputError(
                f"--{name.replace('_', '-')}: --weighting uniform has no confidence to change; "
                "leave it out, or choose another --weighting"
            )
    rows = []
    for example in data.kept:
        confidence = torch.from_numpy(store.row(example.row)) if store else None
        weight = None
        if config.weighting == "guide":
            assert confidence is not None
            weight = transform_weight(confidence, weight_transform(config))
        elif config.end_weight is not None:
            weight = torch.ones(example.targets)
        if config.end_weight is not None:
            assert weight is not None
            weight = torch.where(torch.from_numpy(_ends_turn(example)), config.end_weight, weight)
        rows.append(WeightedRow(example, weight, confidence))
    return rows


def _ends_turn(example: Example) -> np.ndarray:
    """Which targets bool [targets] are the last of their turn."""
    following = np.append(example.is_target[1:], False)
    return ~following[example.is_target]


def token_weight(
    config: TrainOptions, micro: Sequence[WeightedRow], device: torch.device
) -> Tensor | Literal["self"] | None:
    """The weights of a micro-batch's targets as `weighted_ce` takes them."""
    if config.weighting == "self":
        return "self"
    weights = [row.weight for row in micro if row.weight is not None]
    return torch.cat(weights).to(device) if weights else None


def weight_transform(config: TrainOptions) -> WeightTransform:
    """What the options make of a confidence."""
    return WeightTransform(
        power=config.confidence_power,
        floor=config.confidence_floor,
        threshold=config.confidence_threshold,
    )
