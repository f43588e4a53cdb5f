"""Weights of tokens: their formulas; the same loss as with weights formed in the kernels."""

from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gift.config import TrainConfig
from gift.data.encoding import Example
from gift.errors import InputError
from gift.training.micro_batches import IGNORE_INDEX
from gift.weighting.formulas import WEIGHTINGS
from gift.weighting.targets import Targets, find_turn_ends, gather_targets
from gift.weighting.weights import (
    check_weighting,
    guided_rows,
    known_zeros,
    refuse_all_zero,
    token_weights,
)
from gift_kernels import TokenStats, WeightTransform, weighted_ce

# Those that the loss can form by itself.
PLAIN = ("uniform", "self", "guide", "own-times-guide")


def options(weighting: Any, **settings) -> TrainConfig:
    return TrainConfig(
        model="", data=Path("rows"), output=Path("adapter"), weighting=weighting, **settings
    )


def example(row: int, targets: int, turns: int = 1) -> Example:
    """A row of turns with so many targets each, a prompt's token before each turn."""
    is_target = np.array(([False] + [True] * targets) * turns)
    return Example(row, np.arange(len(is_target), dtype=np.int32), is_target)


def targets_of(config: TrainConfig, guide: list[Tensor], turns: int = 1, lines=None) -> Targets:
    """Rows with these confidences, in so many turns each."""
    examples = [example(row, len(q) // turns, turns) for row, q in enumerate(guide)]
    return gather_targets(guided_rows(config, examples, guide, lines))


def own_stats(p: Tensor) -> TokenStats:
    return TokenStats(nll=-p.log(), confidence=p, entropy=p)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("self", [0.25, 0.5, 1, 0.5]),
        ("guide", [0.5, 0.5, 0.25, 0]),
        ("own-times-guide", [0.125, 0.25, 0.25, 0]),
        # own nll − the guide's: ln 2, 0, −ln 4 and −∞; a share of 0.6 of 4 tokens is 2 of them
        ("excess", [1, 1, 0, 0]),
        # nats over ln 20
        ("entropy", [0.25 / log(20), 0.5 / log(20), 1 / log(20), 0.5 / log(20)]),
    ],
)
def test_each_weighting_is_its_formula(weighting, expected):
    own, guide = torch.tensor([0.25, 0.5, 1, 0.5]), torch.tensor([0.5, 0.5, 0.25, 0])
    config = options(weighting)
    weight = token_weights(config, own_stats(own), targets_of(config, [guide]))
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float32))
    # max(w, 0.2) ** 2, and 0 below 0.15; the weights of "uniform" are no confidences.
    config = options(weighting, confidence_floor=0.2, confidence_power=2, confidence_threshold=0.15)
    weight = token_weights(config, own_stats(own), targets_of(config, [guide]))
    changed = [max(w, 0.2) ** 2 if w >= 0.15 else 0 for w in expected]
    torch.testing.assert_close(weight, torch.tensor(changed, dtype=torch.float32))


def test_entropy_of_more_than_20_equal_tokens_is_a_weight_of_1():
    config, nats = options("entropy"), torch.tensor([0.0, log(20), log(50), log(2)])
    own = TokenStats(entropy=nats)
    weight = token_weights(config, own, targets_of(config, [torch.zeros(4)]))
    torch.testing.assert_close(weight, torch.tensor([0, 1, 1, log(2) / log(20)]))


def test_excess_takes_the_share_of_every_row_and_the_earlier_of_equals():
    own = torch.tensor([0.5, 0.1, 0.2, 0.2, 0.9, 0.3, 0.3, 0.3])  # rows of 5 and 3 targets
    guide = [torch.full((5,), 0.4), torch.full((3,), 0.9)]
    expected = {
        0.4: [0, 1, 1, 0, 0, 1, 0, 0],  # 2 of 5, and 1.2, so 1 of 3
        0.6: [0, 1, 1, 1, 0, 1, 1, 0],  # 3 of 5, and 1.8, so 2 of 3
        0.5: [0, 1, 1, 1, 0, 1, 1, 0],  # halves round up: 2.5 of 5, and 1.5 of 3
        0.01: [0, 1, 0, 0, 0, 1, 0, 0],  # one at least
        1.0: [1] * 8,
    }
    for share, chosen in expected.items():
        config = options("excess", excess_share=share)
        assert token_weights(config, own_stats(own), targets_of(config, guide)).tolist() == chosen


@pytest.mark.parametrize(("share", "size", "chosen"), [(0.5, 1, 1), (0.5, 9, 5), (0.29, 50, 15)])
def test_half_a_token_of_a_share_rounds_up(share, size, chosen):
    config = options("excess", excess_share=share)
    weight = token_weights(
        config, own_stats(torch.rand(size)), targets_of(config, [torch.ones(size)])
    )
    assert weight.sum() == chosen


def test_excess_leaves_tokens_of_a_fixed_weight_out_of_the_count():
    own = torch.tensor([0.5, 0.6, 0.7, 0.001])
    config = options("excess", excess_share=0.34, end_weight=0.25)
    weight = token_weights(config, own_stats(own), targets_of(config, [torch.ones(4)]))
    assert weight.tolist() == [1, 0, 0, 0.25]


@pytest.mark.parametrize("weighting", ["self", "guide", "own-times-guide", "entropy"])
def test_levels_average_over_a_line_or_a_response_before_the_transform(weighting):
    own, guide = torch.rand(9), torch.rand(9)
    signal = {
        "self": own,
        "guide": guide,
        "own-times-guide": own * guide,
        "entropy": own / log(20),
    }[weighting]
    # A row of 3 targets; one of two turns of 3. The first row's second line is one token.
    lines = [np.array([False, False, True]), np.array([False, True, False, False, False, True])]
    spans = {
        "token": [[i] for i in range(9)],
        "step": [[0, 1], [2], [3], [4, 5], [6, 7], [8]],
        "sequence": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    }
    for level, groups in spans.items():
        config = options(weighting, confidence_level=level, confidence_power=2)
        examples = [example(0, 3), example(1, 3, turns=2)]
        confidence = list(guide.split([3, 6]))
        rows = guided_rows(config, examples, confidence, lines if level == "step" else None)
        weight = token_weights(config, own_stats(own), gather_targets(rows))
        expected = torch.empty(9)
        for group in groups:
            expected[group] = signal[group].mean() ** 2
        torch.testing.assert_close(weight, expected)


def test_a_fixed_weight_has_no_part_in_the_mean_of_its_line():
    config = options("self", confidence_level="sequence", end_weight=0.0)
    targets = targets_of(config, [torch.zeros(3)])
    assert known_zeros(config, targets).tolist() == [False, False, True]
    # What is left out has statistics of 0.
    own = TokenStats(confidence=torch.tensor([0.25, 0.75, 0.0]))
    assert token_weights(config, own, targets).tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weight_of_a_turns_end_is_set_for_the_last_target_of_each_turn(weighting):
    config = options(weighting, end_weight=0.0, confidence_floor=0.3)
    own, guide = torch.rand(4), torch.rand(4)
    ends = find_turn_ends(example(0, 2, turns=2))
    assert ends.tolist() == [False, True, False, True]
    targets = targets_of(config, [guide], turns=2)
    assert targets.turn_ends.tolist() == ends.tolist()
    weight = token_weights(config, own_stats(own), targets)
    assert (weight == 0).tolist() == ends.tolist() and float(weight[~ends].min()) >= 0.3
    assert known_zeros(config, targets).tolist() == ends.tolist()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("power", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_known_to_be_zero_is_zero_whatever_the_model_says(weighting, power, floor, level):
    config = options(
        weighting,
        confidence_power=power,
        confidence_floor=floor,
        confidence_threshold=0.2,
        confidence_level=level,
    )
    guide = torch.tensor([0.0, 1e-30, 0.1, 0.19, 0.2, 0.3, 1.0])
    targets = targets_of(config, [guide, torch.full((2,), 0.1)])
    zero = known_zeros(config, targets)
    if weighting == "guide":
        known = [True] * 4 + [False] * 3 if level == "token" else [False] * 7
        assert zero.tolist() == [*known, True, True]
    own = [own_stats(torch.full((9,), p)) for p in (0.0, 1e-30, 0.3, 1.0)]
    always = torch.stack([token_weights(config, stats, targets) == 0 for stats in own]).all(0)
    has_bound = WEIGHTINGS[weighting].most is not None or not WEIGHTINGS[weighting].statistics
    assert torch.equal(zero, always if has_bound else torch.zeros(9, dtype=torch.bool))


REFUSED = [
    ("uniform", {"confidence_level": "step"}, "--confidence-level: --weighting uniform"),
    ("uniform", {"confidence_power": 2}, "--confidence-power: --weighting uniform"),
    ("excess", {"confidence_level": "sequence"}, "--confidence-level: --weighting excess"),
    ("excess", {"confidence_power": 0}, "--confidence-power: --weighting excess"),
    ("excess", {"confidence_threshold": 0.5}, "--confidence-threshold: --weighting excess"),
    ("guide", {"excess_share": 0.5}, "--excess-share: --weighting guide"),
    ("self", {"control": "random"}, "--control: --weighting self"),
    ("guide", {"control": "shuffle", "confidence_level": "sequence"}, "--control random"),
]


@pytest.mark.parametrize(("weighting", "settings", "message"), REFUSED)
def test_an_option_that_the_weighting_does_not_read_is_one_error(weighting, settings, message):
    with pytest.raises(InputError, match=message):
        check_weighting(options(weighting, **settings))


def test_a_threshold_above_every_weight_is_refused():
    with pytest.raises(ValueError, match="confidence_threshold"):
        options("self", confidence_threshold=1.5)


@pytest.mark.parametrize(
    ("weighting", "settings"),
    [
        ("guide", {"confidence_threshold": 0.5}),
        ("own-times-guide", {"confidence_threshold": 0.5}),
        ("guide", {"control": "constant", "confidence_threshold": 0.5}),
    ],
)
def test_a_guide_that_leaves_every_weight_at_zero_is_one_error(weighting, settings):
    guide = [torch.tensor([0.1, 0.2]), torch.tensor([0.4])]
    examples = [example(row, len(q)) for row, q in enumerate(guide)]
    config = options(weighting, **settings)
    with pytest.raises(InputError, match="every weight of the data is 0"):
        refuse_all_zero(config, guided_rows(config, examples, guide))
    guide[1][0] = 0.9
    config = options(weighting, **settings, end_weight=0)  # the ends alone are not 0.2 and less
    with pytest.raises(InputError, match="every weight of the data is 0"):
        refuse_all_zero(config, guided_rows(config, examples, guide))
    config = options(weighting, confidence_threshold=0.3)
    refuse_all_zero(config, guided_rows(config, examples, guide))


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
    targets = targets_of(config, [guide])
    left_out = known_zeros(config, targets)
    nll, stats = weighted_ce(
        outside,
        head,
        target.masked_fill(left_out, IGNORE_INDEX),
        bias=bias,
        reduction="none",
        stats=("top1", *WEIGHTINGS[weighting].statistics),
    )
    weight = token_weights(config, stats, targets)
    open_loss = torch.where(weight == 0, 0, weight * nll).sum()
    open_loss.backward()
    return [(loss.detach(), inside.grad), (open_loss.detach(), outside.grad)]  # pyright: ignore


@pytest.mark.parametrize("settings", [{}, {"power": 0.5, "floor": 0.01}], ids=["plain", "changed"])
@pytest.mark.parametrize("weighting", PLAIN)
def test_weights_in_the_open_are_those_inside_the_loss_bit_for_bit(weighting, settings):
    inside, outside = inside_and_in_the_open(weighting, settings, infinite=False)
    assert float(inside[0]) > 0 and bool(inside[1].abs().sum(1).min() > 0)
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])


@pytest.mark.parametrize("weighting", ["self", "guide", "own-times-guide", "excess"])
def test_weight_of_zero_shuts_out_an_infinite_nll(weighting):
    inside_and_open = inside_and_in_the_open(weighting, {}, infinite=True)
    # The loss itself has no "excess".
    for loss, gradient in inside_and_open[weighting == "excess" :]:
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all()) and not gradient[3].any()
