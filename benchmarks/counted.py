"""Each goal of the kernels beside what is counted of the code as it is, and what was last measured.

    python -m benchmarks.counted

Counted are rounds of tiles on 132 SMs and what a tile and a chunk take beside their products
(`chunk_size.call_time`), the merge's bytes from the L2 cache, and eager's bytes from memory, at the
rates of an H200. The lower bound is products that leave no SM idle, the time of other
implementations the measured one. What overlaps with what, only a GPU shows.
"""

from collections.abc import Callable, Sequence

from benchmarks import goals, readme, report
from benchmarks.cases import HEADS, MATRICES
from benchmarks.report import Row
from benchmarks.sparse_backward import BANDWIDTH, TOKENS, UNIT_SECONDS
from gift_kernels.linear_ce.triton.chunk_size import (
    END_OF_TILE,
    LAUNCHES,
    STATISTICS_ROWS,
    Work,
    call_time,
    cdiv,
    chunk_shape,
    head_chunk_shape,
    waves,
)
from gift_kernels.linear_ce.triton.tiles import LOGIT_TILES, PRODUCT_TILES
from gift_kernels.lora_merge.triton import configs

SMS, LLAMA = 132, "llama-3.1-8b"
# The merge: bytes a second from L2, seconds to split factors, and its kernel over a copy where the
# copy alone bounds it. Eager: bytes of a logit, share of the SMs that its products keep busy.
L2_RATE, SPLIT_SECONDS, OVER_A_COPY = 5.5e12, 4e-6, 1.11
EAGER_BYTES, EAGER_BUSY = 36, 0.97


def work_of(head: str) -> Work:
    """A head on an H100 or H200, in bfloat16."""
    shape = HEADS[head]
    return Work(SMS, LOGIT_TILES[90][0], PRODUCT_TILES[90][0], shape.vocab, shape.hidden, 2)


def product(work: Work, tokens: int) -> float:
    """Steps of one product that leaves no SM idle."""
    return tokens * work.vocab_size * work.hidden_size / (128 * 256 * work.sms)


def frozen(head: str = LLAMA, tokens: int = TOKENS, guided: bool = False) -> float:
    """Over the lower bound; a guide's tiles are taken as those of statistics alone."""
    work = work_of(head)
    guide = (work.vocab_size, work.hidden_size) if guided else (0, 0)
    time = call_time(work, tokens, chunk_shape(work, tokens, guide))
    time += statistics(work, tokens) if guided else 0
    return time / ((2 + guided) * product(work, tokens))


def statistics(work: Work, tokens: int) -> float:
    """Steps of logits without exponentials, whose tiles end at least as soon as others."""
    whole, rest = divmod(tokens, STATISTICS_ROWS)
    chunks = [STATISTICS_ROWS] * whole + [rest] * (rest > 0)
    rounds = sum(waves(rows, work.vocab_size, work.logit_tiles, work.sms) for rows in chunks)
    return rounds * (work.hidden_size + END_OF_TILE) + len(chunks) * LAUNCHES


def confidence(head: str) -> float:
    """Over the lower bound."""
    work = work_of(head)
    return statistics(work, TOKENS) / product(work, TOKENS)


def trainable(head: str) -> float:
    """Over the lower bound, for as many rows as dW keeps exponentials of."""
    work = work_of(head)
    shape = head_chunk_shape(work, TOKENS)
    return call_time(work, TOKENS, shape, with_dw=True) / (3 * product(work, TOKENS))


def merge(rank: int, split: bool) -> float:
    """Over a copy: the longer of a copy and the reads from L2, and the splitting."""
    rows, columns = MATRICES["llama-3.1-8b up"]
    size = 4 if split else 2
    copy = 4 * rows * columns / BANDWIDTH
    reads = []
    for config in configs("split" if split else "native", False, 90):
        tiles = config.kwargs
        of_b = rows * rank * size * cdiv(columns, tiles["BLOCK_K"])
        of_a = columns * rank * size * cdiv(rows, tiles["BLOCK_M"] * tiles["TILES_M"])
        reads.append((2 * rows * columns + of_a + of_b) / L2_RATE)
    return (max(min(reads), OVER_A_COPY * copy) + SPLIT_SECONDS * split) / copy


def eager_ms() -> float:
    """Milliseconds with a frozen head."""
    of_logits = EAGER_BYTES * TOKENS * HEADS[LLAMA].vocab / BANDWIDTH
    return 1e3 * (2 * UNIT_SECONDS / EAGER_BUSY + of_logits)


# By what a goal's name begins with: units of the lower bound, and the count by head and tokens.
COUNTS: dict[str, tuple[int, Callable[[str, int], float]]] = {
    "trainable head": (3, lambda head, tokens: trainable(head)),
    "frozen head and guide": (3, lambda head, tokens: frozen(head, tokens, guided=True)),
    "frozen head": (2, frozen),
    "token_confidence": (1, lambda head, tokens: confidence(head)),
    "merge, float32 factors, rank to 64": (0, lambda head, tokens: merge(64, split=True)),
    "merge, float32 factors, rank 128": (0, lambda head, tokens: merge(128, split=True)),
    "merge, bfloat16 factors": (0, lambda head, tokens: merge(64, split=False)),
}


# What a GPU has to say beyond whether the goal is met, by what a goal's name begins with.
OPEN = {
    "trainable head": "whether weighting E in registers slows the product for dW",
    "frozen head and guide": "one launch for both heads, or two (candidates)",
    "frozen head, 8192": "chunks and tiles chosen since",
    "frozen head, 32768": "chunks and tiles chosen since",
    "frozen head, ×": "how much of a tile's end is hidden behind products",
    "frozen head": "sums in parts; launches beside so short kernels",
    "token_confidence": "how much of a tile's end is hidden behind products",
    "merge, float32": "three products of parts have not run",
    "merge, bfloat16": "the call beside its kernel",
    "eager": "16-bit products with float32 results have not run",
}


def counted(goal: goals.Goal, head: str, other_ms: float | None) -> float | None:
    """What the goal bounds, by count; None where it takes a time that was not measured."""
    if goal.name.startswith("eager"):
        return None if other_ms is None else eager_ms() / other_ms
    units, count = next(value for name, value in COUNTS.items() if goal.name.startswith(name))
    words = goal.name.split()
    tokens = int(words[words.index("tokens,") - 1]) if "tokens," in words else TOKENS
    over_bound = count(head, tokens)
    if not goal.name.endswith("fastest other"):
        return over_bound
    milliseconds = 1e3 * over_bound * units * UNIT_SECONDS * tokens / TOKENS
    return None if other_ms is None else milliseconds / other_ms


def table(rows: Sequence[Row]) -> list[Row]:
    """One row for each goal of time and head, from the rows of measured results."""
    found: dict[tuple[str, str], Row] = {}
    for goal in goals.GOALS:
        if goal.name.endswith((" MB", " of q")):
            continue
        for head in goal.heads:
            chosen = [r for r in rows if r["provider"] == goal.provider and goal.chosen(r)]
            row = next((r for r in chosen if r["head"] == head and r["data"] != "flat"), None)
            case = [one for one in rows if row is not None and one["case"] == row["case"]]
            measured = None if row is None else goal.figure(row, case)
            other_ms = row["time_ms"] / measured if row is not None and measured else None
            figure = counted(goal, head, other_ms)
            found[goal.name, head] = {
                "goal": goal.name,
                "case": head,
                "at most": goal.bound,
                "counted": figure,
                "measured": measured,
                "open": next(text for name, text in OPEN.items() if goal.name.startswith(name)),
            }
    return list(found.values())


def main() -> None:
    """Prints the table, measured figures from the newest stored results of a GPU."""
    results = [report.read_results(folder) for folder in readme.newest()]
    (gpu,) = [one for one in results if not one.environment["device"].startswith("CPU")]
    environment = gpu.environment
    print(f"Measured: {environment['device']}, commit {environment['commit']}\n")
    print("\n".join(report.plain_table(table(gpu.rows))))


if __name__ == "__main__":
    main()
