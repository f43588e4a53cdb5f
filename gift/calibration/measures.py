"""How far a guide's probabilities can be trusted.

- Reliability: for tokens in bands of the guide's *largest* probability, how often the likeliest
  token is the target. Bands of the target's own probability would be circular: a token of high
  probability is the likeliest by definition.
- Expected calibration error: Σ n_b / N · |share_b − mean_b| over the bands (Guo et al. 2017,
  arXiv 1706.04599, equation 3).
- AUROC of a score for right and wrong rows: the chance that a right row's is larger, a tie counting
  half, which is Mann and Whitney's U over the number of pairs; with a percentile bootstrap over
  rows. 0.5 is no information.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, mannwhitneyu

from gift.training.micro_batches import BAND_EDGES, BAND_NAMES


def reliability(largest: np.ndarray, top1: np.ndarray, bands: int) -> list[dict[str, float]]:
    """The bands of `largest` float [N] that have tokens, each with its means.

    `top1` bool [N] says where the first choice is the target.
    """
    edges = np.linspace(0, 1, bands + 1)
    # By comparison with the edges, so that a probability of exactly 0.3 is in the band from 0.3.
    number = np.clip(np.searchsorted(edges, largest, side="right") - 1, 0, bands - 1)
    found = []
    for band in np.unique(number):
        inside = number == band
        found.append(
            {
                "from": float(edges[band]),
                "to": float(edges[band + 1]),
                "tokens": int(inside.sum()),
                "mean_largest": float(largest[inside].mean(dtype=np.float64)),
                "first_choice_is_target": float(top1[inside].mean()),
            }
        )
    return found


def calibration_error(bands: Sequence[dict[str, float]]) -> float:
    """The expected calibration error of `reliability`'s bands."""
    gaps = [
        band["tokens"] * abs(band["first_choice_is_target"] - band["mean_largest"])
        for band in bands
    ]
    return sum(gaps) / sum(band["tokens"] for band in bands)


def by_kind(kinds: np.ndarray, confidence: np.ndarray, top1: np.ndarray) -> list[dict[str, Any]]:
    """For each kind of token, and for all: its share, mean confidence and share by confidence.

    All [N]: `kinds` are names, `confidence` the target's probability.
    """
    band = np.searchsorted(BAND_EDGES, confidence, side="right")
    chosen = {"all": np.ones(len(kinds), bool)}
    chosen |= {str(kind): kinds == kind for kind in np.unique(kinds)}
    found = [
        {
            "kind": kind,
            "tokens": int(inside.sum()),
            "share": float(inside.mean()),
            "mean_confidence": float(confidence[inside].mean(dtype=np.float64)),
            "first_choice_is_target": float(top1[inside].mean()),
            "by_confidence": {
                name: float((band[inside] == number).mean())
                for number, name in enumerate(BAND_NAMES)
            },
        }
        for kind, inside in chosen.items()
    ]
    return sorted(found, key=lambda entry: (entry["kind"] != "all", -entry["tokens"]))


def auroc(
    score: np.ndarray, correct: np.ndarray, resamples: int, seed: int
) -> dict[str, float] | None:
    """AUROC of `score` float [rows] for `correct` bool [rows], and the ends of its 95 % interval.

    None with fewer than two right or two wrong rows. Right and wrong rows are resampled separately.
    """
    right, wrong = score[correct], score[~correct]
    if len(right) < 2 or len(wrong) < 2:
        return None

    def area(right: np.ndarray, wrong: np.ndarray, axis: int) -> np.ndarray:
        pairs = right.shape[axis] * wrong.shape[axis]
        with np.errstate(all="ignore"):  # of the p-value, which is not used
            return mannwhitneyu(right, wrong, axis=axis, method="asymptotic").statistic / pairs

    interval = bootstrap(
        (right, wrong),
        area,
        n_resamples=resamples,
        batch=100,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {
        "auroc": float(area(right, wrong, axis=0)),
        "low": float(interval.low),
        "high": float(interval.high),
    }
