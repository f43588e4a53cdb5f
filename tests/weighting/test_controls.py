"""Controls of the guide's weights: each a hand-written computation, and what they depend on."""

import pytest
import torch
from torch import Tensor

from gift.errors import InputError
from gift.weighting.controls import controlled_weights
from gift_kernels import WeightTransform

PLAIN = WeightTransform()
CONTROLS = ("shuffle", "random", "invert", "constant")


def confidences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(n, generator=generator) ** 2 for n in (7, 30, 1, 500)]


def weights(
    control, transform=PLAIN, seed=3, rows=(4, 0, 9, 2), fixed_ends=False
) -> tuple[list[Tensor], list[Tensor]]:
    """The guide's own weights of each row, and those under the control."""
    given = confidences()
    free = [torch.ones(len(q), dtype=torch.bool) for q in given]
    if fixed_ends:
        for row in free:
            row[-1] = False
    guides = [
        torch.where(is_free, q.clamp(min=transform.floor) ** transform.power, 0)
        for q, is_free in zip(given, free, strict=True)
    ]
    return guides, controlled_weights(control, seed, list(rows), given, free, transform)


@pytest.mark.parametrize("fixed_ends", [False, True])
@pytest.mark.parametrize("transform", [PLAIN, WeightTransform(power=3, floor=0.1)])
@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_keeps_the_mean_weight_and_leaves_fixed_tokens_alone(
    control, transform, fixed_ends
):
    guides, controlled = weights(control, transform, fixed_ends=fixed_ends)
    torch.testing.assert_close(torch.cat(controlled).mean(), torch.cat(guides).mean())
    assert [len(row) for row in controlled] == [len(row) for row in guides]
    if fixed_ends:
        assert not any(row[-1] for row in controlled)


def test_shuffle_permutes_within_each_row():
    guides, controlled = weights("shuffle")
    for before, after in zip(guides, controlled, strict=True):
        torch.testing.assert_close(after.sort().values, before.sort().values)
    assert not torch.equal(guides[1], controlled[1]) and not torch.equal(guides[3], controlled[3])


def test_random_draws_from_the_confidences_of_all_rows():
    # A row of few different values gets those of the others, in their proportion, times the scale.
    given = [torch.full((900,), 0.1), torch.full((300,), 0.4), torch.full((600,), 0.8)]
    free = [torch.ones_like(q, dtype=torch.bool) for q in given]
    drawn = controlled_weights("random", 7, [0, 1, 2], given, free, PLAIN)
    values = torch.cat(drawn).unique()
    torch.testing.assert_close(values / values[0], torch.tensor([1.0, 4, 8]))
    for row in drawn:
        shares = [float((row == value).float().mean()) for value in values]
        assert shares == pytest.approx([1 / 2, 1 / 6, 1 / 3], abs=0.08)


def test_invert_is_one_minus_q_and_constant_is_the_mean():
    given = confidences()
    pool = torch.cat(given)
    _, inverted = weights("invert", WeightTransform(power=2))
    scale = (pool**2).sum() / ((1 - pool) ** 2).sum()
    for q, weight in zip(given, inverted, strict=True):
        torch.testing.assert_close(weight, (1 - q) ** 2 * scale)
    _, constant = weights("constant", WeightTransform(power=2))
    for weight in constant:
        torch.testing.assert_close(weight, torch.full_like(weight, float((pool**2).mean())))


@pytest.mark.parametrize("control", ["shuffle", "random"])
def test_draws_depend_on_the_seed_and_the_rows_number(control):
    _, first = weights(control)
    _, again = weights(control)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    _, other_seed = weights(control, seed=4)
    _, other_row = weights(control, rows=(4, 1, 9, 2))
    assert not torch.equal(first[1], other_seed[1]) and not torch.equal(first[1], other_row[1])


def test_a_control_of_weight_0_is_one_error():
    ones = [torch.ones(3)]
    free = [torch.ones(3, dtype=torch.bool)]
    with pytest.raises(InputError, match="--control: every weight of invert is 0"):
        controlled_weights("invert", 0, [0], ones, free, PLAIN)
    zeros = controlled_weights("constant", 0, [0], [torch.zeros(3)], free, PLAIN)
    assert zeros[0].tolist() == [0, 0, 0]
