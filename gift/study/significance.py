"""Intervals and tests for accuracies of the same questions under several seeds.

One array [seeds, questions] a pair holds the share of right answers, or its difference between two
methods, question by question and seed by seed. Its mean varies with the sample of questions and
with the seeds, which are crossed. Its variance is the two-way clustered one of Cameron, Gelbach and
Miller 2011 (J. Business & Economic Statistics 29(2), equation 2.11), each of its terms a
bootstrap's:

    V = V_seeds + V_questions − V_cells      at least the larger of the first two

Seeds are few, so quantiles are Student's, with Satterthwaite's degrees of freedom. Pairs are fixed:
the interval is for these pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
# Shares are from 0 to 1, so a smaller standard error is rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval and the p-value of the hypothesis that it is 0 (two-sided).

    Interval and p-value are None where nothing varies.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None


def estimate(pairs: Sequence[np.ndarray], *, least: float = -1.0, seed: int = 0) -> Estimate:
    """The mean over pairs; an array [seeds, questions] per pair. `seed` is the bootstrap's.

    With one seed the interval covers questions only. It is clipped to `least` and 1: shares are 0
    to 1, their differences -1 to 1.
    """
    rng = np.random.default_rng(seed)
    mean = float(np.mean([values.mean() for values in pairs]))
    parts = [_variance(values, rng) for values in pairs]
    total = sum(part.total for part in parts)
    error = total**0.5 / len(pairs)
    if error < ROUNDING or not all(part.terms for part in parts):
        return Estimate(mean, None, None, None)
    degrees = total**2 / sum(term**2 / df for part in parts for term, df in part.terms)
    low, high = np.clip(stats.t.interval(LEVEL, degrees, mean, error), least, 1)
    p = 2 * stats.t.sf(abs(mean) / error, degrees)
    return Estimate(mean, float(low), float(high), float(p))


class _Variance(NamedTuple):
    """The variance of one pair's mean, and its terms with their degrees of freedom."""

    total: float
    terms: list[tuple[float, int]]


def _variance(values: np.ndarray, rng: np.random.Generator) -> _Variance:
    means = [values.mean(axis=1 - axis) for axis in (0, 1) if values.shape[axis] > 1]
    terms = [_bootstrap(ones, rng) for ones in means]
    cells = _bootstrap(values.ravel(), rng) if len(terms) == 2 else 0.0
    total = max([sum(terms) - cells, *terms])
    degrees = [len(ones) - 1 for ones in means]
    return _Variance(total, list(zip(terms, degrees, strict=True)))


def _bootstrap(values: np.ndarray, rng: np.random.Generator) -> float:
    """The variance of the mean of independent values [n], unbiased."""
    resampled = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10**7 // len(values)),
        method="percentile",
        rng=rng,
    )
    return float(resampled.standard_error) ** 2 * len(values) / (len(values) - 1)


def permute_runs(differences: Sequence[float], seed: int = 0) -> float | None:
    """Two-sided p-value of a permutation test that flips the signs of runs' differences.

    Exact for up to 13 runs. With n runs it is at least 2 / 2^n, so few runs cannot be significant.
    None for a single run.
    """
    if len(differences) < 2:
        return None
    result = stats.permutation_test(
        (differences, np.zeros(len(differences))),
        lambda ours, theirs, axis: np.mean(ours - theirs, axis=axis),
        permutation_type="samples",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, Scandinavian J. Statistics 6(2)).

    SciPy has no such function (`false_discovery_control` bounds another error rate).
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return adjusted.tolist()
