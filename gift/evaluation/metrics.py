"""Metrics of an evaluation, computed and printed.

All metrics take questions as the independent units (samples of one question are not):
- avg@k: the mean share of right samples, with its standard error over questions (Miller 2024,
  "Adding Error Bars to Evals", arXiv 2411.00640: with equally many samples per question, its
  clustered standard error is that of the question means);
- pass@n for n = 1…k: the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, equation 1).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from gift.config import EvaluateConfig
from gift.console import print_summary, print_table
from gift.storage.publish import warn

WARN_UNFINISHED = 0.2


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> list[float]:
    """The unbiased pass@k of every question: 1 − C(n − c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1. Their mean is the data set's pass@k.

    Args:
        correct: right samples of each question (c).
        samples: samples of every question (n), at least `k`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: got {k}, expected 1 to the number of samples, {samples}")
    if any(not 0 <= count <= samples for count in correct):
        raise ValueError(f"correct: got {list(correct)}, expected counts from 0 to {samples}")
    return [1 - math.comb(samples - count, k) / math.comb(samples, k) for count in correct]


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of one value per question; None for a single question.

    sqrt(Σ (v − mean)² / (n (n − 1))), the central limit theorem's (Miller 2024, arXiv 2411.00640).
    """
    if len(values) < 2:
        return None
    mean = fmean(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) * (len(values) - 1)))


def summarize(
    samples: Sequence[dict[str, Any]], groups: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Metrics of rows of samples.jsonl, equally many per question; `groups` by question."""
    by_question: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_question[sample["row"]].append(sample)
    correct = [sum(s["correct"] for s in by_question[row]) for row in sorted(by_question)]
    count = len(samples) // len(correct)
    accuracies = [right / count for right in correct]
    tokens = [s["tokens"] for s in samples if s["tokens"] is not None]  # some servers count none
    metrics: dict[str, Any] = {
        "questions": len(correct),
        "samples": count,
        **_mean(accuracies, "accuracy"),
        "pass": {
            str(k): _mean(pass_at_k(correct, count, k), "estimate") for k in range(1, count + 1)
        },
        "unfinished": fmean(not s["finished"] for s in samples),
        "unfinished_correct": fmean(s["matches"] and not s["finished"] for s in samples),
        "no_answer_found": fmean(s["extracted"] is None for s in samples),
        "mean_reply_tokens": fmean(tokens) if tokens else None,
        "check_timeouts": sum(s["problem"] == "timeout" for s in samples),
        "check_crashes": sum(s["problem"] == "crash" for s in samples),
    }
    return {**metrics, "groups": _by_group(accuracies, groups)}


def summarize_choices(
    samples: Sequence[dict[str, Any]], groups: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Metrics of the rows of samples.jsonl of multiple choices, one per question."""
    accuracies = [float(sample["correct"]) for sample in samples]
    right = [sample["probabilities"][sample["answer"]] for sample in samples]
    return {
        "questions": len(samples),
        **_mean(accuracies, "accuracy"),
        "mean_probability_of_answer": fmean(right),
        "groups": _by_group(accuracies, groups),
    }


def _by_group(
    accuracies: Sequence[float], groups: Sequence[str | None] | None
) -> dict[str, dict[str, Any]]:
    members: dict[str, list[float]] = defaultdict(list)
    for group, accuracy in zip(groups or [None] * len(accuracies), accuracies, strict=True):
        if group is not None:
            members[group].append(accuracy)
    return {
        group: {"questions": len(values), **_mean(values, "accuracy")}
        for group, values in sorted(members.items())
    }


def _mean(values: Sequence[float], name: str) -> dict[str, float | None]:
    return {name: fmean(values), "standard_error": standard_error(values)}


def print_metrics(config: EvaluateConfig, metrics: dict[str, Any]) -> None:
    """Prints an evaluation's metrics, and a warning where many replies did not end."""
    accuracy = _percent(metrics["accuracy"], metrics["standard_error"])
    shown: dict[str, Any] = {"questions": metrics["questions"]}
    if "samples" in metrics:
        mean = f"avg@{metrics['samples']}"
        shown |= {mean: accuracy, **_reply_figures(metrics)}
    else:
        mean = "accuracy"
        right = _percent(metrics["mean_probability_of_answer"])
        shown |= {mean: accuracy, "mean probability of the right option": right}
    print_summary(
        f"Evaluation of {config.served_model or config.model}",
        shown | {"written to": config.output},
    )
    if metrics["groups"]:
        print_table(
            "By group",
            ("group", "questions", mean),
            [
                (
                    name,
                    str(group["questions"]),
                    _percent(group["accuracy"], group["standard_error"]),
                )
                for name, group in metrics["groups"].items()
            ],
        )
    if metrics.get("unfinished", 0) > WARN_UNFINISHED:
        warn(
            f"{_percent(metrics['unfinished'])} of the replies did not end within "
            f"{config.max_new_tokens} tokens or the model's context; raise --max-new-tokens "
            "(gift run: --eval-max-new-tokens), or the model does not use its end token"
        )


def _reply_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    count, estimates = metrics["samples"], metrics["pass"]
    tokens = metrics["mean_reply_tokens"]
    shown = [n for n in (1, 2, 4, 8, 16, 32, 64) if 1 < n < count] + [count] * (count > 1)
    return {
        **{
            f"pass@{n}": _percent(
                estimates[str(n)]["estimate"], estimates[str(n)]["standard_error"]
            )
            for n in shown
        },
        "unfinished replies": _percent(metrics["unfinished"]),
        "replies without an answer": _percent(metrics["no_answer_found"]),
        "mean reply tokens": "unknown" if tokens is None else f"{tokens:.1f}",
        "check timeouts": metrics["check_timeouts"],
        "check crashes": metrics["check_crashes"],
    }


def _percent(share: float, error: float | None = None) -> str:
    return f"{share:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")
