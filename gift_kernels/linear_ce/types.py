"""Types of the linear cross-entropy: groups of arguments, results, and the operator's problem."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Reduction = Literal["none", "sum", "mean", "weighted_mean"]
Statistic = Literal["nll", "confidence", "lse", "entropy", "top1", "largest", "weight"]


@dataclass(frozen=True, eq=False)
class Guide:
    """A second model whose confidence in the targets is the weight, without gradient.

    hidden: [*B, Dg], the guide's last hidden states, aligned with the targets.
    lm_head_weight: [Vg, Dg] of the same dtype and device, with the model's token ids.
    bias, logit_scale, logit_softcap: options of the guide's head, as in `weighted_ce`.
    temperature: positive, divides the guide's logits after the soft-cap.
    """

    hidden: Tensor
    lm_head_weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class WeightTransform:
    """Weights w become max(w, floor) ** power, and 0 where w < threshold.

    All three are numbers >= 0. Weights that are at most `floor`, or below `threshold`, get no
    gradient. NaN stays NaN.
    """

    power: float = 1.0
    floor: float = 0.0
    threshold: float = 0.0


# Leaves every weight as it is, negative ones too.
NO_TRANSFORM = WeightTransform(1.0, -float("inf"), -float("inf"))


@dataclass(frozen=True)
class VocabParallel:
    """A head whose rows are sharded over the ranks of a process group.

    This rank passes rows [start, start + V) of the whole head, of its bias and of the guide's; the
    slices of all ranks cover the head without gap or overlap, in any order, and none is empty.
    Hidden states, targets, weights and options are the same on every rank, and so is what requires
    grad: where they differ, every rank raises ValueError. An argument that is invalid by itself,
    such as a wrong dtype, raises on the ranks that got it; the others wait for them until the
    group's timeout.
    """

    group: ProcessGroup
    start: int


class TokenStats(NamedTuple):
    """Statistics of every row, [*B] without gradient: float32 (float64 for float64 inputs).

    Fields that were not requested are None. All are 0 (`top1` False) on ignored rows.
    """

    nll: Tensor | None = None  # −log softmax of the target, in nats
    confidence: Tensor | None = None  # exp(−nll)
    lse: Tensor | None = None  # log-sum-exp of the logits
    entropy: Tensor | None = None  # of the softmax, in nats
    top1: Tensor | None = None  # bool: no logit is larger than the target's
    largest: Tensor | None = None  # the largest probability of the softmax
    weight: Tensor | None = None  # the row's weight in the loss


class LinearInputs(NamedTuple):
    """One model's inputs of the loss: hidden [N, D], head weight [V, D], bias [V] and options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None


class VocabShard(NamedTuple):
    """This rank's slice of the vocabulary: rows [start, start + V) of the head, and the group.

    No rank of the group holds more than `most` rows, of the head and of the guide's.
    """

    group: ProcessGroup
    start: int
    most: int


class Problem(NamedTuple):
    """One call of the operator.

    Row weights are `row_weight` [N], of any floating-point dtype; or the confidence of `guide`, or
    of the model itself with `self_weight`; or 1: all of them transformed, and 0 on ignored rows.
    `temperature` divides the guide's logits, or the model's own where there is neither guide nor
    gradient. With `rowwise` there is one loss per row, with its own upstream gradient, so dW and db
    are computed in the backward. Without `keep_zero_rows` rows of weight 0 may be left out of every
    product, and their statistics are then 0. `with_stats` requests lse, top1 and largest. With
    `defer` dW and db may be left to the backward, which knows the upstream gradient.
    """

    head: LinearInputs
    guide: LinearInputs | None
    target: Tensor
    row_weight: Tensor | None
    temperature: float
    self_weight: bool
    transform: WeightTransform
    ignore_index: int
    want_dh: bool
    want_dw: bool
    want_db: bool
    rowwise: bool
    with_stats: bool
    with_entropy: bool
    keep_zero_rows: bool
    shard: VocabShard | None
    chunk_size: int | None
    defer: bool = False

    def heads(self) -> dict[str, LinearInputs]:
        """The heads by argument: the model's, and the guide's if there is one."""
        heads = {"lm_head_weight": self.head}
        return heads if self.guide is None else heads | {"guide.lm_head_weight": self.guide}


class LinearCE(NamedTuple):
    """The operator's results; None, or from a registered operator empty, if not requested.

    Floats are in accumulation dtype, and 0 on rows that were left out. dH is unscaled: the
    gradient of each row's nll; dW and db are those of the sum of the loss.
    """

    loss: Tensor  # [] weighted sum of nll, exactly 0 where a weight is; rowwise its terms [N]
    row_count: Tensor  # [] rows that are not ignored, at least 1
    nll: Tensor  # [N]
    weight: Tensor  # [N]
    lse: Tensor | None = None  # [N]
    top1: Tensor | None = None  # [N] bool
    largest: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N]
    dh: Tensor | None = None  # [N, D]
    dw: Tensor | None = None  # [V, D]
    db: Tensor | None = None  # [V]
    deferred: Any = None  # of Triton alone: what `solve_deferred` makes dW and db of


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
