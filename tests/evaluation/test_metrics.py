"""Estimates and standard errors agree with their definitions."""

import itertools
import math
from statistics import fmean

import pytest

from gift.evaluation.metrics import pass_at_k, standard_error, summarize


@pytest.mark.parametrize(("samples", "k"), [(5, 1), (5, 2), (5, 4), (5, 5), (1, 1)])
def test_pass_at_k_is_the_mean_over_all_draws(samples, k):
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        draws = [any(draw) for draw in itertools.combinations(outcomes, k)]
        assert pass_at_k([correct], samples, k) == [pytest.approx(fmean(draws))]


def test_pass_at_k_refuses_impossible_counts():
    with pytest.raises(ValueError, match="k: got 3"):
        pass_at_k([1], 2, 3)
    with pytest.raises(ValueError, match="correct: got"):
        pass_at_k([3], 2, 1)


def test_the_standard_error_is_clustered_over_questions():
    outcomes = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]]
    mean = fmean(itertools.chain(*outcomes))
    # Cluster-robust variance of a mean: squares of each question's summed deviations.
    sums = [sum(value - mean for value in question) for question in outcomes]
    clustered = math.sqrt(sum(total**2 for total in sums)) / 20
    ours = standard_error([fmean(question) for question in outcomes])
    assert ours == pytest.approx(clustered * math.sqrt(5 / 4))
    assert standard_error([0.5]) is None


def test_the_summary_counts_what_went_wrong():
    sample = {"row": 0, "correct": False, "matches": False, "finished": True, "tokens": 3}
    rows = [
        sample | {"problem": problem, "extracted": extracted}
        for problem, extracted in [("timeout", None), ("crash", "1"), (None, "2"), ("timeout", "")]
    ]
    metrics = summarize(rows)
    assert metrics["check_timeouts"] == 2 and metrics["check_crashes"] == 1
    assert metrics["no_answer_found"] == 0.25
    assert metrics["accuracy"] == 0 and metrics["standard_error"] is None
