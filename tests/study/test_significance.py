"""Coverage of intervals; tests and their adjustment against known results."""

import math

import numpy as np
import pytest

from gift.study import significance
from gift.study.significance import estimate, holm, permute_runs

TRUE = 0.1
STUDIES = 1000
# Seeds, questions, pairs; spread of seeds, of questions, of what is left.
WORLDS = {
    "questions vary most": (3, 100, 1, 0.01, 0.3, 0.2),
    "seeds vary most": (3, 40, 1, 0.1, 0.05, 0.1),
    "nothing but noise, two pairs": (3, 40, 2, 0.0, 0.0, 0.4),
    "one seed": (1, 60, 1, 0.0, 0.3, 0.2),
}
# Where nothing but noise varies, the interval is too wide: the variance is at least that of the
# seeds' means, and at least that of the questions'.
COVERED = {**dict.fromkeys(WORLDS, 0.95), "nothing but noise, two pairs": 0.985}


def simulate(rng, seeds, questions, pairs, of_seeds, of_questions, noise) -> list[np.ndarray]:
    return [
        TRUE
        + rng.normal(0, of_seeds, (seeds, 1))
        + rng.normal(0, of_questions, (1, questions))
        + rng.normal(0, noise, (seeds, questions))
        for _ in range(pairs)
    ]


@pytest.mark.parametrize("world", WORLDS)
def test_the_interval_covers_the_truth_in_95_of_100_studies(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For speed: an error of 5 % in each standard error, which covers as much on average.
    monkeypatch.setattr(significance, "RESAMPLES", 200)
    rng = np.random.default_rng(5)
    found = [estimate(simulate(rng, *WORLDS[world]), seed=n) for n in range(STUDIES)]
    covered = sum(one.low <= TRUE <= one.high for one in found) / STUDIES
    # Two standard errors of such a share: intervals 10 % too narrow or too wide are found out.
    expected = COVERED[world]
    assert abs(covered - expected) <= 2 * math.sqrt(expected * (1 - expected) / STUDIES), covered


def test_an_interval_of_questions_alone_is_the_central_limit_theorems() -> None:
    values = np.random.default_rng(1).random((1, 400))
    half = 1.966 * values.std(ddof=1) / math.sqrt(400)
    found = estimate([values])
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.05)
    assert found.mean - found.low == pytest.approx(half, rel=0.05)


def test_an_interval_beside_zero_has_a_p_below_5_percent() -> None:
    rng = np.random.default_rng(2)
    for shift in np.linspace(0.0, 0.3, 25):
        found = estimate([rng.normal(shift, 0.4, (3, 30))])
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize(
    "values",
    [np.ones((3, 5)), np.full((3, 4), 1 / 3), np.full((2, 3), -0.1), np.array([[0.3]])],
    ids=["ones", "thirds", "tenths", "single"],
)
def test_what_does_not_vary_has_no_interval(values: np.ndarray) -> None:
    found = estimate([values])
    assert (found.mean, found.low, found.high, found.p) == (values.mean(), None, None, None)


def test_the_permutation_test_of_runs_is_exact() -> None:
    assert permute_runs([1.0, 2.0, 0.5, 3.0]) == 2 / 16
    # ±1 ±2 ±4 is 1, 3, 5 or 7 from zero, twice each.
    assert permute_runs([1.0, 2.0, -4.0]) == 1.0
    assert permute_runs([1.0, -2.0, 4.0]) == 6 / 8
    assert permute_runs([1.0]) is None


def test_holm_adjusts_as_the_paper_says() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
