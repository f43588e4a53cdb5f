"""The goals of the kernels, and whether a run meets them.

Ratios are of times in one run. The lower bound ("floor" in results) is the time of the fewest
matrix products with which the operation can be computed, or of a copy of the weight; the fastest
other is full logits or an exact peer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cases import HEADS
from benchmarks.report import Row

TOKENS = 8192
MODELS = tuple(list(HEADS)[:6])
LLAMA = ("llama-3.1-8b",)
UP = ("llama-3.1-8b up",)


@dataclass(frozen=True)
class Goal:
    """`figure` is to be at most `bound` in the rows of `provider` that `chosen` picks.

    `figure` gets a row and all rows of its case. Heads without such a row are not measured.
    """

    name: str
    bound: float
    chosen: Callable[[Row], bool]
    figure: Callable[[Row, Sequence[Row]], float | None]
    provider: str = "gift triton"
    heads: tuple[str, ...] = LLAMA


def _weighted(weighting: str, trainable: bool = False, tokens: int = TOKENS) -> Callable:
    return lambda row: (
        row["op"] == "weighted_ce"
        and row["direction"] == "both"
        and row["weighting"] == weighting
        and row["trainable"] is trainable
        and row["tokens"] == tokens
        and row["head"] in MODELS
    )


def _confidence(row: Row) -> bool:
    return row["op"] == "token_confidence" and row["tokens"] == TOKENS and row["head"] in MODELS


def _merge(factors: str, ranks: range) -> Callable[[Row], bool]:
    return lambda row: (
        row["op"] == "lora_merge"
        and row["factor_dtype"] == factors
        and row["rank"] in ranks
        and row["head"].endswith(" up")
    )


def _of(column: str) -> Callable[[Row, Sequence[Row]], float | None]:
    return lambda row, case: row.get(column)


def _over_full_logits(row: Row, case: Sequence[Row]) -> float | None:
    times = [other.get("time_ms") for other in case if other["provider"] == "full logits"]
    return row["time_ms"] / times[0] if times and times[0] and row.get("time_ms") else None


LOWER_BOUND, OTHERS, MEMORY = _of("ratio_floor"), _of("ratio_best_peer"), _of("peak_mb")
IN_PLACE = "gift triton, in place"
GOALS = (
    Goal("trainable head, × lower bound", 1.08, _weighted("uniform", True), LOWER_BOUND),
    Goal("trainable head, × the fastest other", 1.0, _weighted("uniform", True), OTHERS),
    Goal(
        "frozen head, 512 tokens, × lower bound",
        1.35,
        _weighted("offline", tokens=512),
        LOWER_BOUND,
    ),
    *(
        Goal(
            f"frozen head, {tokens} tokens, × the fastest other",
            1.0,
            _weighted("offline", tokens=tokens),
            OTHERS,
        )
        for tokens in (256, 512, 1024, 2048, 8192, 32768)
    ),
    Goal("token_confidence, × lower bound", 1.03, _confidence, LOWER_BOUND),
    Goal("frozen head, × lower bound", 1.07, _weighted("offline"), LOWER_BOUND, heads=MODELS),
    Goal("frozen head and guide, × lower bound", 1.07, _weighted("guide"), LOWER_BOUND),
    Goal(
        "merge, float32 factors, rank to 64, × a copy",
        1.5,
        _merge("float32", range(65)),
        LOWER_BOUND,
        IN_PLACE,
        UP,
    ),
    Goal(
        "merge, float32 factors, rank 128, × a copy",
        2.0,
        _merge("float32", range(128, 129)),
        LOWER_BOUND,
        IN_PLACE,
        UP,
    ),
    Goal(
        "merge, bfloat16 factors, rank to 64, × a copy",
        1.15,
        _merge("bfloat16", range(65)),
        LOWER_BOUND,
        IN_PLACE,
        UP,
    ),
    Goal("eager, × full logits", 1.2, _weighted("offline"), _over_full_logits, "gift eager"),
    Goal("frozen head, extra MB", 300, _weighted("offline"), MEMORY),
    Goal("frozen head and guide, extra MB", 300, _weighted("guide"), MEMORY),
    Goal("token_confidence, extra MB", 300, _confidence, MEMORY),
    Goal("token_confidence, relative error of q", 1e-3, _confidence, _of("error_q")),
)


def judge(rows: Sequence[Row]) -> list[Row]:
    """One row for each goal and head: the bound, the measured figure, and whether it is met."""
    found: list[Row] = []
    for goal in GOALS:
        cases = [row for row in rows if row["provider"] == goal.provider and goal.chosen(row)]
        heads = dict.fromkeys([*goal.heads, *(row["head"] for row in cases)])
        for head in heads:
            of_head = [row for row in cases if row["head"] == head] or [None]
            found += [_judged(goal, head, row, rows) for row in of_head]
    return found


def _judged(goal: Goal, head: str, row: Row | None, rows: Sequence[Row]) -> Row:
    figure = None
    if row is not None and row["status"] == "ok":
        figure = goal.figure(row, [one for one in rows if one.get("case") == row.get("case")])
    met = "not measured" if figure is None else "yes" if figure <= goal.bound else "no"
    rank = f"rank {row['rank']}" if row is not None and row["rank"] else ""
    case = head if row is None else ", ".join(filter(None, [head, row["data"], rank]))
    return {"goal": goal.name, "case": case, "at most": goal.bound, "found": figure, "met": met}


# Of calls: microseconds until they return, at most.
HOST_GOALS = (
    ("frozen head", 256, 800.0),
    ("lora_merge_, bfloat16 factors", 0, 40.0),
    ("lora_merge_, float32 factors", 0, 40.0),
)


def judge_host(rows: Sequence[Row]) -> list[Row]:
    """The same for the time of the host, from the rows of `host_time`."""
    found: list[Row] = []
    for call, tokens, bound in HOST_GOALS:
        times = [row["µs"] for row in rows if (row["call"], row["tokens"]) == (call, tokens)]
        figure = times[0] if times else None
        met = "not measured" if figure is None else "yes" if figure <= bound else "no"
        case = f"{call}, {tokens} tokens" if tokens else call
        row = {"goal": "host time, µs", "case": case, "at most": bound, "found": figure, "met": met}
        found.append(row)
    return found


# Of stages: the way's stage, the column, how much at least, and the way it is a multiple of.
STAGE_GOALS = (
    ("annotate", "tokens/s", 1.6, "authors' way"),
    ("annotate", "useful TFLOP/s", 550.0, ""),
    ("train step", "tokens/s", 1.5, "Transformers, PEFT, Liger"),
    ("train step", "useful TFLOP/s", 350.0, ""),
)
STAGE_MODEL = "llama-3.1-8b"


def judge_stages(rows: Sequence[Row]) -> list[Row]:
    """The same for whole stages, from the rows of `end_to_end`."""
    found: list[Row] = []
    for stage, column, bound, other in STAGE_GOALS:
        values = {
            row["way"]: row[column]
            for row in rows
            if row["stage"] == stage and row["model"] == STAGE_MODEL and column in row
        }
        ours = values.get("gift")
        theirs = [value for way, value in values.items() if other and way.startswith(other)]
        figure = ours
        if other:
            figure = None if ours is None or not theirs else ours / max(theirs)
        met = "not measured" if figure is None else "yes" if figure >= bound else "no"
        name = f"{stage}, {column}" + (f", × {other}" if other else "")
        row = {"goal": name, "case": STAGE_MODEL, "at least": bound, "found": figure, "met": met}
        found.append(row)
    return found
