"""The weightings of `--weighting`: one entry of WEIGHTINGS each.

Letters: N target tokens, p the trained model's confidence in a token, q the guide's.
`gift --help` reads names and sentences here, so torch is imported where it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from gift.weighting.targets import Targets
    from gift_kernels import TokenStats
    from gift_kernels.linear_ce.types import Statistic

# EAFT divides the entropy of the 20 likeliest tokens, an approximation, by its maximum.
ENTROPY_SCALE = log(20)


class FormulaOptions(Protocol):
    """The options of `gift train` that formulas read."""

    @property
    def excess_share(self) -> float: ...

    @property
    def end_weight(self) -> float | None: ...


class Signal(Protocol):
    """Computes float32 [N] from the trained model's statistics and the targets' fixed values."""

    def __call__(self, own: TokenStats, targets: Targets, options: FormulaOptions, /) -> Tensor: ...


@dataclass(frozen=True)
class Weighting:
    """How a token's weight is formed.

    formula, source: for `--help` and the table in the docs. about: one sentence for a study's
    report. signal: the weight before `--confidence-level`, threshold, floor and power. statistics:
    the trained model's statistics that `signal` reads. needs_guide: whether `signal` reads the
    guide's confidences. most: an upper bound of `signal` that does not read the trained model.
    Optional: tokens whose weight is then known to be 0 are left out of the loss's matrix products.
    unread: options that this weighting does not read; setting them is an error.
    """

    formula: str
    source: str
    about: str
    signal: Signal
    statistics: tuple[Statistic, ...] = ()
    needs_guide: bool = False
    most: Signal | None = None
    unread: tuple[str, ...] = ()


def _one(own: TokenStats, targets: Targets, options: FormulaOptions) -> Tensor:
    return (targets.row >= 0).float()


def _own_confidence(own: TokenStats, targets: Targets, options: FormulaOptions) -> Tensor:
    assert own.confidence is not None
    return own.confidence


def _guide_confidence(own: TokenStats, targets: Targets, options: FormulaOptions) -> Tensor:
    assert targets.guide is not None
    return targets.guide


def _product(own: TokenStats, targets: Targets, options: FormulaOptions) -> Tensor:
    return _own_confidence(own, targets, options) * _guide_confidence(own, targets, options)


def _entropy(own: TokenStats, targets: Targets, options: FormulaOptions) -> Tensor:
    assert own.entropy is not None
    return (own.entropy / ENTROPY_SCALE).clamp(max=1)


def _excess(own: TokenStats, targets: Targets, options: FormulaOptions) -> Tensor:
    import torch

    assert own.nll is not None and targets.guide is not None
    # ∞ − ∞ where both models give the token probability 0: such tokens come last.
    excess = (own.nll + torch.log(targets.guide)).nan_to_num(-torch.inf)
    return _top_share(excess, targets, options)


def _top_share(score: Tensor, targets: Targets, options: FormulaOptions) -> Tensor:
    """1 on the share of each row's tokens with the largest scores [N], at least one; else 0.

    Half a token rounds up. Of equal scores the earlier token comes first. Tokens of a fixed weight
    are left out.
    """
    import torch

    counts = torch.ones_like(score, dtype=torch.float64)
    if options.end_weight is not None:
        counts = (~targets.turn_ends).double()
        score = torch.where(targets.turn_ends, -torch.inf, score)
    by_score = score.argsort(descending=True, stable=True)
    # Sorted by row, then by score: a row's tokens keep the row's indices.
    order = by_score[targets.row[by_score].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - targets.row
    size = torch.zeros_like(counts).index_add_(0, targets.row, counts)[targets.row]
    # 0.29 · 50 is a little less than 14.5 in floating point.
    chosen = (options.excess_share * size + 0.5 + 1e-9).floor().clamp(min=1)
    return (rank < chosen).to(score.dtype)


WEIGHTINGS: dict[str, Weighting] = {
    "guide": Weighting(
        formula="the annotated confidence q",
        source="GIFT, arXiv 2605.01256",
        about="A token weighs as much as the guide is confident in it.",
        signal=_guide_confidence,
        needs_guide=True,
    ),
    "uniform": Weighting(
        formula="1",
        source="Shadow-FT, arXiv 2505.12716; plain fine-tuning of the instruct model",
        about="Every token weighs 1, as in plain fine-tuning.",
        signal=_one,
        unread=("confidence_level", "confidence_floor", "confidence_power", "confidence_threshold"),
    ),
    "self": Weighting(
        formula="the trained model's own confidence p",
        source="DFT, arXiv 2508.05629",
        about="The trained model's own confidence in the token.",
        signal=_own_confidence,
        statistics=("confidence",),
    ),
    "own-times-guide": Weighting(
        formula="p · q",
        source="",
        about="The trained model's confidence times the guide's.",
        signal=_product,
        statistics=("confidence",),
        needs_guide=True,
        most=_guide_confidence,
    ),
    "excess": Weighting(
        formula="1 on the share of each row's tokens where log q - log p is largest, else 0",
        source="Rho-1, arXiv 2404.07965",
        about="1 for the share of each row's tokens that the trained model finds hardest compared "
        "with the guide, 0 for the others.",
        signal=_excess,
        statistics=("nll",),
        needs_guide=True,
        unread=("confidence_level", "confidence_power", "confidence_threshold"),
    ),
    "entropy": Weighting(
        formula="the trained model's own entropy / ln 20, at most 1",
        source="EAFT, arXiv 2601.02151",
        about="A token weighs more the less sure the trained model is there of any token.",
        signal=_entropy,
        statistics=("entropy",),
    ),
}
