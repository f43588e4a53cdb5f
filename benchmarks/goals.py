"""What the kernels are meant to reach, and what a run says about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.report import Row

HEADS = ("llama-3.1-8b", "qwen2.5-7b", "gemma-2-9b")
TOKENS = 8192


@dataclass(frozen=True)
class Goal:
    """`figure` of a row is to be at most `bound`; rows are those of `provider` that `chosen` picks.

    A floor's time is that of as many bare products as the operation cannot do without.
    """

    name: str
    bound: float
    chosen: Callable[[Row], bool]
    figure: Callable[[Row], float | None]
    provider: str = "gift triton"
    heads: tuple[str, ...] = HEADS


def _weighted(weighting: str, trainable: bool) -> Callable[[Row], bool]:
    return lambda row: (
        row["op"] == "weighted_ce"
        and row["direction"] == "both"
        and row["weighting"] == weighting
        and row["trainable"] is trainable
        and row["tokens"] == TOKENS
        and row["head"] in HEADS
    )


def _confidence(row: Row) -> bool:
    return row["op"] == "token_confidence" and row["tokens"] == TOKENS and row["head"] in HEADS


def _merge(row: Row) -> bool:
    return row["op"] == "lora_merge" and row["rank"] <= 128 and row["head"].endswith(" up")


def _floors(units: int) -> Callable[[Row], float | None]:
    """Time over that of one bare product."""
    return lambda row: row["ratio_floor"] * units if row.get("ratio_floor") else None


GOALS = (
    Goal("token_confidence, × one bare product", 1.15, _confidence, _floors(1)),
    Goal("frozen head, × one bare product", 2.15, _weighted("offline", False), _floors(2)),
    Goal("frozen head and guide, × one bare product", 3.25, _weighted("guide", False), _floors(3)),
    Goal("trainable head, × one bare product", 3.3, _weighted("uniform", True), _floors(3)),
    Goal(
        "frozen head, × the fastest peer",
        1.0,
        _weighted("offline", False),
        lambda row: row.get("ratio_best_peer"),
    ),
    Goal(
        "frozen head, extra MB",
        300,
        _weighted("offline", False),
        lambda row: row.get("peak_mb"),
    ),
    Goal(
        "frozen head and guide, extra MB",
        300,
        _weighted("guide", False),
        lambda row: row.get("peak_mb"),
    ),
    Goal("token_confidence, extra MB", 300, _confidence, lambda row: row.get("peak_mb")),
    Goal(
        "token_confidence, relative error of q",
        1e-3,
        _confidence,
        lambda row: row.get("error_q"),
    ),
    Goal(
        "merge, × a copy",
        1 / 0.9,
        _merge,
        lambda row: row.get("ratio_floor"),
        provider="gift triton, in place",
        heads=("llama-3.1-8b up",),
    ),
    Goal(
        "merge, × the fastest peer",
        1 / 3,
        _merge,
        lambda row: row.get("ratio_best_peer"),
        provider="gift triton, in place",
        heads=("llama-3.1-8b up",),
    ),
)


def judge(rows: Sequence[Row]) -> list[Row]:
    """One row for each goal and head: what was wanted, what was found, and whether it is met."""
    found: list[Row] = []
    for goal in GOALS:
        cases = [row for row in rows if row["provider"] == goal.provider and goal.chosen(row)]
        heads = dict.fromkeys([*goal.heads, *(row["head"] for row in cases)])
        for head in heads:
            of_head = [row for row in cases if row["head"] == head] or [None]
            found += [_judged(goal, head, row) for row in of_head]
    return found


def _judged(goal: Goal, head: str, row: Row | None) -> Row:
    figure = goal.figure(row) if row is not None and row["status"] == "ok" else None
    met = "not measured" if figure is None else "yes" if figure <= goal.bound else "no"
    case = head if row is None else ", ".join(filter(None, [head, row["data"]]))
    return {"goal": goal.name, "case": case, "at most": goal.bound, "found": figure, "met": met}
