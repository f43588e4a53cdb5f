"""Values of the target tokens that do not depend on the trained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gift.data.batches import copy_to
from gift.data.encoding import Example


@dataclass(frozen=True)
class GuidedRow:
    """One row for the loss. Of its targets, all [targets]:

    the guide's `confidence` float32 if any; `span`, the index int64 of the first target with which
    it shares a confidence; the `weight` float32 if it does not depend on the trained model.
    """

    example: Example
    confidence: Tensor | None
    span: Tensor
    weight: Tensor | None = None


class Targets(NamedTuple):
    """Values of N target tokens that do not depend on the trained model, all [N].

    `guide` has the annotated confidences float32 (None without a store), `fixed_weight` the weights
    float32 if they do not depend on the trained model. `turn_ends` is True on the last token of
    each turn. `row` and `span` int64 are the indices of the first target of the row, and of the
    span of targets that share one confidence.
    """

    guide: Tensor | None
    fixed_weight: Tensor | None
    turn_ends: Tensor
    row: Tensor
    span: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return Targets(*(None if tensor is None else copy_to(tensor, device) for tensor in self))  # pyright: ignore


def gather_targets(rows: Sequence[GuidedRow]) -> Targets:
    """The targets of some rows, one row after the other."""
    sizes = torch.tensor([row.example.targets for row in rows])
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    given = [row.confidence for row in rows if row.confidence is not None]
    weights = [row.weight for row in rows if row.weight is not None]
    return Targets(
        guide=torch.cat(given) if given else None,
        fixed_weight=torch.cat(weights) if weights else None,
        turn_ends=torch.cat([find_turn_ends(row.example) for row in rows]),
        row=starts,
        span=starts + torch.cat([row.span for row in rows]),
    )


def find_turn_ends(example: Example) -> Tensor:
    """Which targets bool [targets] of the example are the last of their turn."""
    following = np.append(example.is_target[1:], False)
    return torch.from_numpy(~following[example.is_target])
