"""Sizes of chunks, their tiles, and the range of E.

A chunk has at most `rows` × `columns` logits, or their exponentials E; see `chunk`.
"""

import functools
import math
from typing import NamedTuple

import torch

from gift_kernels.linear_ce.triton.tiles import (
    DW_TILES,
    PRODUCT_TILES,
    LogitTiles,
    Machine,
    ProductTiles,
    can_use_tma,
    is_uneven,
    logit_tiles,
    machine_of,
    tiles_for,
)
from gift_kernels.linear_ce.types import LinearInputs

# CHUNK_BYTES: a chunk's E, hidden states and partial sums; GUIDE_BYTES: what a guide may add.
# LEAST_BYTES: least for E, however wide the hidden states. HEAD_BYTES: E of a chunk for dW.
CHUNK_BYTES, GUIDE_BYTES = 143_000_000, 13_000_000
LEAST_BYTES, HEAD_BYTES = 64_000_000, 168_000_000
# Fewest and most rows of a chunk in a call of more rows; with fewer the head is read too often.
ROWS = (2048, 4096)
HEAD_ROWS = 8192
# Parts of dH (split-K): most parts, and most bytes of all but the first.
MOST_SPLITS, SPLIT_BYTES = 8, 40_000_000
# Without E: most rows and, only with kept rows, most columns.
STATISTICS_ROWS, STATISTICS_COLUMNS = 4096, 65536
ALL = 1 << 62  # more columns than any head has
# Time of a tile outside its loop over K, and of a chunk outside its tiles, in steps of that loop;
# one of 128 × 256 takes 16 cycles of an H100's SM. The end of a tile of logits issues 1800 cycles
# of instructions and stores 64 KiB; a tile of dH stores 128 KiB, and loads them first for all but
# the first columns; three launches idle for 15 μs. `call_time` says what they were checked against.
END_OF_TILE, STORED_TILE, ADDED_TILE, LAUNCHES = 400, 500, 1000, 3000
COUNT_STEP = 128  # numbers of rows are rounded up to this; no BLOCK_N is larger
ROW_BLOCK = (4, 1024)  # rows and columns at a time where rows are copied or scaled
INTERPRETER_ROW_BLOCK = (16, 64)
SLICE_BLOCK, INTERPRETER_SLICE_BLOCK = 64, 2  # slices at a time whose partial sums are joined
# By how much logits in base 2 may exceed their reference, and by how much the reference is below
# its guess. float16 reaches from 2^−24 to 2^16; bfloat16 and float32 from 2^−126 to 2^128.
MARGIN = {torch.float16: (13.5, 10.0), torch.bfloat16: (63.0, 0.0), torch.float32: (63.0, 0.0)}


class Shape(NamedTuple):
    """Rows and columns of a chunk, at most."""

    rows: int
    columns: int


class Plan(NamedTuple):
    """Sizes of a chunk, and its tiles.

    Chunks with E: `chunk` for dH, `kept` for rows whose E is kept for dW, `again` for other rows of
    dW; without E: `statistics`.
    """

    machine: Machine
    chunk: Shape
    kept: Shape
    again: Shape
    statistics: Shape
    logit_tiles: LogitTiles
    product_tiles: ProductTiles  # of dH
    dw_tiles: ProductTiles
    row_block: tuple[int, int]
    slice_block: int
    splits: int  # parts of a chunk's columns with separate sums in dH (split-K)

    @property
    def pad(self) -> int:
        """Rows of a chunk up to a multiple of this are zeros, so that every tile is whole."""
        return max(self.logit_tiles.BLOCK_N, self.product_tiles.BLOCK_M, self.dw_tiles.BLOCK_K)


def default_plan(
    head: LinearInputs, guide: LinearInputs | None = None, *, with_entropy: bool = False
) -> Plan:
    """The plan of `impl="triton"` on this head's device, for one head or two in one launch."""
    machine = machine_of(head.hidden.device)
    heads = [one for one in (head, guide) if one is not None]
    return _plan(
        machine,
        head.hidden.dtype,
        cdiv(head.hidden.shape[0], COUNT_STEP) * COUNT_STEP,
        tuple(tuple(one.weight.shape) for one in heads),
        # A chunk's own rows are aligned if D is a multiple of 8.
        tma=all(can_use_tma(machine, h.weight) and h.weight.shape[1] % 8 == 0 for h in heads),
        biased=any(h.bias is not None for h in heads),
        capped=any(h.logit_softcap is not None for h in heads),
        entropy=with_entropy,
        uneven=any(is_uneven(h.weight) for h in heads),
    )


@functools.lru_cache(maxsize=4096)
def _plan(
    machine: Machine,
    dtype: torch.dtype,
    count: int,
    heads: tuple[tuple[int, ...], ...],
    *,
    tma: bool,
    biased: bool,
    capped: bool,
    entropy: bool,
    uneven: bool,
) -> Plan:
    """`default_plan` for N `count` and heads [V, D], the model's first."""
    options = {"biased": biased, "capped": capped, "entropy": entropy, "guided": len(heads) > 1}
    tiles = logit_tiles(machine, dtype, tma=tma, uneven=uneven, **options)[0]
    product_tiles = tiles_for(PRODUCT_TILES, machine, dtype, uneven=uneven)[0]
    dw_tiles = tiles_for(DW_TILES, machine, dtype, uneven=uneven)[0]
    small, splits = Shape(64, 256), 2
    shapes = (small, small, small, small)
    blocks = (INTERPRETER_ROW_BLOCK, INTERPRETER_SLICE_BLOCK)
    if machine.arch > 0:
        (vocab_size, size), *of_guide = heads
        work = Work(machine.sms, tiles, product_tiles, vocab_size, size, dtype.itemsize)
        again = min(HEAD_ROWS, max(count, COUNT_STEP))
        kept = min(max(size, 1) * 4 // dtype.itemsize, again)
        shapes = (
            chunk_shape(work, count, *of_guide),
            head_chunk_shape(work, kept),
            head_chunk_shape(work, again),
            Shape(STATISTICS_ROWS, STATISTICS_COLUMNS),
        )
        splits = best_splits(work, count, shapes[0])
        blocks = (ROW_BLOCK, SLICE_BLOCK)
    return Plan(machine, *shapes, tiles, product_tiles, dw_tiles, *blocks, splits)


class Work(NamedTuple):
    """Inputs of the cost model that chooses the shape of a head's chunks."""

    sms: int
    logit_tiles: LogitTiles
    product_tiles: ProductTiles
    vocab_size: int
    hidden_size: int
    itemsize: int


def chunk_shape(work: Work, count: int, guide: tuple[int, ...] = (0, 0)) -> Shape:
    """The shape for dH of `count` rows with about the least `call_time`.

    Chunks are about as large as CHUNK_BYTES allow. Up to ROWS[0] rows are one chunk of rows, with
    as many columns as fit. `guide` has V and D of a guide in the same launches.
    """
    block_v = work.logit_tiles.BLOCK_V
    step = max(work.logit_tiles.BLOCK_N, work.product_tiles.BLOCK_M)
    of_row = work.itemsize * (work.hidden_size + guide[1]) + 8 * (guide[0] // block_v)
    most = CHUNK_BYTES + (GUIDE_BYTES if guide[0] else 0)
    most = max(most, ROWS[0] * of_row + LEAST_BYTES)
    shapes = []
    whole = cdiv(max(count, 1), step) * step
    for rows in range(min(whole, ROWS[0]), min(whole, ROWS[1]) + 1, step):
        # A column takes a number of E, and a slice of them two partial sums.
        slices = (most // rows - of_row) // (block_v * work.itemsize + 8)
        if slices > 0:
            all_slices = cdiv(work.vocab_size, block_v)
            even = cdiv(all_slices, cdiv(all_slices, slices))
            # As many tiles as SMs, or a multiple.
            tile_rows = cdiv(rows, work.logit_tiles.BLOCK_N)
            whole_rounds = tile_rows * slices // work.sms * work.sms // tile_rows
            numbers = {min(slices, all_slices), even, min(max(whole_rounds, 1), all_slices)}
            shapes += [Shape(rows, number * block_v) for number in sorted(numbers)]
    times = {shape: call_time(work, count, shape) for shape in shapes}
    # The estimate is not more accurate than this, and launches take host time.
    about_best = [shape for shape in shapes if times[shape] <= 1.01 * min(times.values())]
    return min(about_best, key=lambda shape: (chunks(work, count, shape), times[shape]))


def chunks(work: Work, count: int, shape: Shape) -> int:
    """How many chunks of this shape cover `count` rows and all columns."""
    return cdiv(count, shape.rows) * cdiv(work.vocab_size, shape.columns)


@functools.cache
def head_chunk_shape(work: Work, rows: int) -> Shape:
    """`chunk_shape` for a trainable head with so many rows in dW, within HEAD_BYTES."""
    block_v = work.logit_tiles.BLOCK_V
    most = max(1, HEAD_BYTES // (rows * work.itemsize) // block_v)
    most = min(most, cdiv(work.vocab_size, block_v))
    least = max((most + 1) // 2, most - 64)
    shapes = [Shape(rows, number * block_v) for number in range(least, most + 1)]
    return min(shapes, key=lambda shape: call_time(work, rows, shape, with_dw=True))


def best_splits(work: Work, count: int, shape: Shape) -> int:
    """Number of parts of dH's product (split-K): the fewest with about the least time.

    Without a split, 512 rows of 4096 hidden units are 64 tiles for 132 SMs.
    """
    rows, columns = min(count, shape.rows), min(shape.columns, work.vocab_size)
    more = max(count * work.hidden_size * 4, 1)  # bytes of another part
    times = {
        splits: waves(rows, work.hidden_size, work.product_tiles, work.sms, splits)
        * (columns / splits + STORED_TILE)
        for splits in range(1, 2 + min(MOST_SPLITS - 1, SPLIT_BYTES // more))
    }
    return min(splits for splits in times if times[splits] <= 1.03 * min(times.values()))


def call_time(work: Work, count: int, shape: Shape, *, with_dw: bool = False) -> float:
    """Time of logits, dH and maybe dW of `count` rows, in steps of tiles of 128 × 256.

    Counts waves of tiles. Its four constants were fitted to an H200's times for 8192 rows of Llama
    3.1 8B's head, frozen, in units of the matrix products alone: 1.117 to 1.148 with chunks of 2048
    × 25088, 1.124 with 4096 × 12544, 1.168 with 2048 × 12544, 1.199 with 8192 × 6144, each within
    1.5 %. The ratios of the estimate are within 1.2 % of these, the first taken as the middle. For
    a trainable head they are up to 5 % off: 1.335, 1.222, 1.140 and 1.142 were measured with kept
    chunks of 2560, 5120, 10240 and 16896 columns.
    """
    sms, logits, products, vocab_size, hidden_size, _ = work
    splits = best_splits(work, count, shape)

    def of_chunk(rows: int, columns: int) -> float:
        time = waves(rows, columns, logits, sms) * (hidden_size + END_OF_TILE) + LAUNCHES
        time += waves(rows, hidden_size, products, sms, splits) * (columns / splits + ADDED_TILE)
        if with_dw:
            time += waves(columns, hidden_size, products, sms) * (rows + END_OF_TILE) + LAUNCHES
        return time

    def of_rows(rows: int) -> float:
        whole, rest = divmod(vocab_size, shape.columns)
        time = whole * of_chunk(rows, shape.columns) + (of_chunk(rows, rest) if rest else 0)
        # The first columns do not accumulate.
        return time - waves(rows, hidden_size, products, sms, splits) * (ADDED_TILE - STORED_TILE)

    whole, rest = divmod(count, shape.rows)
    return whole * of_rows(shape.rows) + (of_rows(rest) if rest else 0)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; `triton.cdiv` takes microseconds."""
    return -(-a // b)


def waves(
    rows: int, columns: int, tiles: LogitTiles | ProductTiles, sms: int, splits: int = 1
) -> float:
    """Waves of tiles over all SMs for [splits, rows, columns], in tiles of 128 × 256."""
    tile_rows, tile_columns = tiles.area
    count = splits * cdiv(rows, tile_rows) * cdiv(columns, tile_columns)
    return cdiv(count, sms) * tile_rows * tile_columns / (128 * 256)


class LogitFactors(NamedTuple):
    """x = cap · tanh(inner · a) of an accumulator a, or x = a; logits are nats · x, or in base 2
    bits · x."""

    inner: float
    cap: float
    bits: float
    nats: float


def logit_factors(head: LinearInputs, temperature: float = 1.0) -> LogitFactors:
    """The factors of a head whose logits are divided by `temperature`."""
    scale, cap = head.logit_scale, head.logit_softcap
    inner, cap, nats = (1.0, 1.0, scale) if cap is None else (scale / cap, cap, 1.0)
    return LogitFactors(inner, cap, nats / temperature / math.log(2), nats / temperature)
