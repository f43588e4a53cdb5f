"""Weights of tokens: their formulas; the loss is the same whether the kernels form them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gift.config import TrainConfig
from gift.data import Example
from gift.train import IGNORE_INDEX
from gift.weighting import STATISTICS, find_turn_ends, known_zeros, token_weights
from gift_kernels import TokenStats, WeightTransform, weighted_ce

WEIGHTINGS = ("uniform", "self", "guide", "own-times-guide")
NO_ENDS = torch.zeros(4, dtype=torch.bool)


def options(weighting: Any, **settings) -> TrainConfig:
    return TrainConfig(
        model="", data=Path("rows"), output=Path("adapter"), weighting=weighting, **settings
    )


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("self", [0.25, 0.5, 1, 0.5]),
        ("guide", [0.5, 0.5, 0.25, 0]),
        ("own-times-guide", [0.125, 0.25, 0.25, 0]),
    ],
)
def test_each_weighting_is_its_formula(weighting, expected):
    own, guide = torch.tensor([0.25, 0.5, 1, 0.5]), torch.tensor([0.5, 0.5, 0.25, 0])
    weight = token_weights(options(weighting), TokenStats(confidence=own), guide, NO_ENDS)
    assert weight.tolist() == expected
    # max(w, 0.2) ** 2, and 0 below 0.15; the weights of "uniform" are no confidences.
    settings = {"confidence_floor": 0.2, "confidence_power": 2, "confidence_threshold": 0.15}
    weight = token_weights(
        options(weighting, **settings), TokenStats(confidence=own), guide, NO_ENDS
    )
    changed = [max(w, 0.2) ** 2 if w >= 0.15 else 0 for w in expected]
    torch.testing.assert_close(weight, torch.tensor(changed, dtype=torch.float32))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weight_of_a_turns_end_is_set_for_the_last_target_of_each_turn(weighting):
    is_target = np.array([False, True, True, False, True, True])
    ends = find_turn_ends([Example(0, np.arange(6, dtype=np.int32), is_target)])
    assert ends.tolist() == [False, True, False, True]
    own, guide = torch.rand(4), torch.rand(4)
    settings = options(weighting, end_weight=0.0, confidence_floor=0.3)
    weight = token_weights(settings, TokenStats(confidence=own), guide, ends)
    assert (weight == 0).tolist() == ends.tolist() and float(weight[~ends].min()) >= 0.3
    assert known_zeros(settings, guide, ends).tolist() == ends.tolist()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("power", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_what_is_known_to_be_zero_is_zero_whatever_the_model_says(weighting, power, floor):
    settings = options(
        weighting, confidence_power=power, confidence_floor=floor, confidence_threshold=0.2
    )
    guide = torch.tensor([0.0, 1e-30, 0.1, 0.19, 0.2, 0.3, 1.0])
    ends = torch.zeros(7, dtype=torch.bool)
    zero = known_zeros(settings, guide, ends)
    assert zero.tolist() == [weighting in ("guide", "own-times-guide")] * 4 + [False] * 3
    for q in (0.0, 1e-30, 0.3, 1.0):
        own = TokenStats(confidence=torch.full((7,), q))
        assert not token_weights(settings, own, guide, ends)[zero].any()


def inside_and_in_the_open(
    weighting: str, settings: dict[str, float], infinite: bool
) -> list[tuple[Tensor, Tensor]]:
    """Loss and dH float32: with the weights inside the loss, and as the trainer does."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(20, 16, generator=generator)
    head = torch.randn(30, 16, generator=generator)
    target = torch.randint(0, 30, (20,), generator=generator)
    guide = torch.rand(20, generator=generator)
    bias = torch.zeros(30)
    if infinite:  # a target that the model holds impossible, and a guide that agrees
        target[target == 29] = 0
        target[3], bias[29], guide[3] = 29, -torch.inf, 0
    inside, outside = (hidden.clone().requires_grad_() for _ in range(2))
    transform = WeightTransform(**settings) if weighting != "uniform" else None
    given = {"uniform": None, "self": "self", "guide": guide}.get(weighting)
    if weighting == "own-times-guide":
        nll = weighted_ce(hidden, head, target, bias=bias, reduction="none")
        given = torch.exp(-nll) * guide
    # Statistics keep the rows of weight 0 in the products: what is compared is of the same shapes.
    options_of_loss: dict[str, Any] = {"transform": transform, "bias": bias, "reduction": "sum"}
    loss, _ = weighted_ce(inside, head, target, given, stats=("nll",), **options_of_loss)
    loss.backward()
    config = options(weighting, **{f"confidence_{name}": v for name, v in settings.items()})
    ends = torch.zeros(20, dtype=torch.bool)
    left_out = known_zeros(config, guide, ends)
    nll, stats = weighted_ce(
        outside,
        head,
        target.masked_fill(left_out, IGNORE_INDEX),
        bias=bias,
        reduction="none",
        stats=STATISTICS,
    )
    weight = token_weights(config, stats, guide, ends)
    open_loss = torch.where(weight == 0, 0, weight * nll).sum()
    open_loss.backward()
    return [(loss.detach(), inside.grad), (open_loss.detach(), outside.grad)]  # pyright: ignore


@pytest.mark.parametrize("settings", [{}, {"power": 0.5, "floor": 0.01}], ids=["plain", "changed"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_in_the_open_are_those_inside_the_loss_bit_for_bit(weighting, settings):
    inside, outside = inside_and_in_the_open(weighting, settings, infinite=False)
    assert float(inside[0]) > 0 and bool(inside[1].abs().sum(1).min() > 0)
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])


@pytest.mark.parametrize("weighting", ["self", "guide", "own-times-guide"])
def test_weight_of_zero_shuts_out_an_infinite_nll(weighting):
    for loss, gradient in inside_and_in_the_open(weighting, {}, infinite=True):
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all()) and not gradient[3].any()
