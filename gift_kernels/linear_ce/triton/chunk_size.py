"""Sizes of chunks, the tiles they are computed with, and the range of E.

A chunk has at most `rows` × `columns` logits, or their exponentials E; see `chunk`.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton

from gift_kernels.linear_ce.triton.tiles import (
    DW_TILES,
    PRODUCT_TILES,
    LogitTiles,
    Machine,
    ProductTiles,
    can_use_tma,
    logit_tiles,
    machine_of,
    tiles_for,
)
from gift_kernels.linear_ce.types import LinearInputs

# CHUNK_BYTES: a chunk's hidden states and E; GUIDE_BYTES: what a guide may add. LEAST_BYTES: lower
# bound for E, however wide the hidden states. HEAD_BYTES: E of a chunk for dW.
CHUNK_BYTES, GUIDE_BYTES = 120_000_000, 26_000_000
LEAST_BYTES, HEAD_BYTES = 64_000_000, 168_000_000
# With fewer rows the head is read too often.
ROWS = (2048, 4096)
HEAD_ROWS = 8192
# Where only partial sums are stored: all columns, or so many while buffers of kept rows exist.
STATISTICS_ROWS, STATISTICS_COLUMNS = 4096, 65536
ALL = 1 << 62  # more columns than any head has
# Time of a tile outside its loop over K, and of a chunk outside its tiles, in steps of that loop.
# Estimated: a step of 128 × 256 takes 8 cycles of an H100's SM; the epilogue of a tile issues
# 1800 cycles of instructions and stores 64 KiB; adding a tile moves 256 KiB; three launches idle
# for 15 μs.
END_OF_TILE, ADDED_TILE, LAUNCHES = 400, 1500, 3000
# One shape for calls of any length, so that results do not depend on it: the best for these.
TOKENS = (2048, 4096, 8192, 16384)
ROW_BLOCK = (4, 1024)  # rows and columns at a time where rows are copied or scaled
INTERPRETER_ROW_BLOCK = (16, 64)
SLICE_BLOCK, INTERPRETER_SLICE_BLOCK = 64, 2  # slices at a time whose partial sums are joined
# How far logits in base 2 may exceed the reference of their exponentials, and how far below its
# guess that is put. float16 reaches from 2^−24 to 2^16; bfloat16 and float32 from 2^−126 to 2^128.
MARGIN = {torch.float16: (13.5, 10.0), torch.bfloat16: (63.0, 0.0), torch.float32: (63.0, 0.0)}


class Shape(NamedTuple):
    """Rows and columns of a chunk, at most."""

    rows: int
    columns: int


class Plan(NamedTuple):
    """Sizes of a chunk, and its tiles.

    Chunks with E: `chunk` for dH, `kept` for rows whose E stays for dW, `again` for other rows of
    dW; without: `statistics`.
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

    @property
    def pad(self) -> int:
        """Rows of a chunk up to a multiple of this are zeros, so that every tile is whole."""
        return max(self.logit_tiles.BLOCK_N, self.product_tiles.BLOCK_M, self.dw_tiles.BLOCK_K)


def default_plan(
    head: LinearInputs, guide: LinearInputs | None = None, *, with_entropy: bool = False
) -> Plan:
    """What `impl="triton"` uses on the device of this head, or of two heads in one launch."""
    machine = machine_of(head.hidden.device)
    dtype = head.hidden.dtype
    heads = [one for one in (head, guide) if one is not None]
    tiles = logit_tiles(
        machine,
        dtype,
        # A chunk's own rows are aligned if D is a multiple of 8.
        tma=all(can_use_tma(machine, h.weight) and h.weight.shape[1] % 8 == 0 for h in heads),
        biased=any(h.bias is not None for h in heads),
        capped=any(h.logit_softcap is not None for h in heads),
        entropy=with_entropy,
        guided=guide is not None,
    )[0]
    product_tiles = tiles_for(PRODUCT_TILES, machine, dtype)[0]
    small = Shape(64, 256)
    shapes = (small, small, small, small)
    blocks = (INTERPRETER_ROW_BLOCK, INTERPRETER_SLICE_BLOCK)
    if machine.arch > 0:
        vocab_size, size = head.weight.shape
        of_guide = (0, 0) if guide is None else tuple(guide.weight.shape)
        work = Work(machine.sms, tiles, product_tiles, vocab_size, size, dtype.itemsize)
        kept = min(size * 4 // dtype.itemsize, HEAD_ROWS)
        shapes = (
            chunk_shape(work, *of_guide),
            head_chunk_shape(work, kept),
            head_chunk_shape(work, HEAD_ROWS),
            Shape(STATISTICS_ROWS, STATISTICS_COLUMNS),
        )
        blocks = (ROW_BLOCK, SLICE_BLOCK)
    dw_tiles = tiles_for(DW_TILES, machine, dtype)[0]
    return Plan(machine, *shapes, tiles, product_tiles, dw_tiles, *blocks)


class Work(NamedTuple):
    """Inputs of the cost model that chooses the shape of a head's chunks."""

    sms: int
    logit_tiles: LogitTiles
    product_tiles: ProductTiles
    vocab_size: int
    hidden_size: int
    itemsize: int


@functools.cache
def chunk_shape(work: Work, guide_vocab: int = 0, guide_hidden: int = 0) -> Shape:
    """The shape for dH that takes the least time, within CHUNK_BYTES."""
    block_v = work.logit_tiles.BLOCK_V
    step = max(work.logit_tiles.BLOCK_N, work.product_tiles.BLOCK_M)
    of_row = work.itemsize * (work.hidden_size + guide_hidden) + 8 * (guide_vocab // block_v)
    most = CHUNK_BYTES + (GUIDE_BYTES if guide_vocab else 0)
    most = max(most, ROWS[0] * of_row + LEAST_BYTES)
    shapes = []
    for rows in range(ROWS[0], ROWS[1] + 1, step):
        columns = (most // rows - of_row) // work.itemsize // block_v * block_v
        shapes += [Shape(rows, columns)] if columns > 0 else []
    return min(shapes, key=lambda shape: sum(call_time(work, n, shape) / n for n in TOKENS))


@functools.cache
def head_chunk_shape(work: Work, rows: int) -> Shape:
    """As `chunk_shape` where dW is made of so many rows too, within HEAD_BYTES."""
    block_v = work.logit_tiles.BLOCK_V
    most = max(1, HEAD_BYTES // (rows * work.itemsize) // block_v)
    least = max((most + 1) // 2, most - 64)
    shapes = [Shape(rows, number * block_v) for number in range(least, most + 1)]
    return min(shapes, key=lambda shape: call_time(work, rows, shape, with_dw=True))


def call_time(work: Work, count: int, shape: Shape, *, with_dw: bool = False) -> float:
    """Time of logits, dH and maybe dW of `count` rows, in steps of tiles of 128 × 256."""
    sms, logits, products, vocab_size, hidden_size, _ = work

    def of_chunk(rows: int, columns: int) -> float:
        time = waves(rows, columns, logits, sms) * (hidden_size + END_OF_TILE) + LAUNCHES
        time += waves(rows, hidden_size, products, sms) * (columns + ADDED_TILE)
        if with_dw:
            time += waves(columns, hidden_size, products, sms) * (rows + END_OF_TILE) + LAUNCHES
        return time

    def parts(total: int, most: int) -> list[tuple[int, int]]:
        full, rest = divmod(total, most)
        return [(number, size) for number, size in ((full, most), (1, rest)) if size]

    return sum(
        row_parts * column_parts * of_chunk(rows, columns)
        for row_parts, rows in parts(count, shape.rows)
        for column_parts, columns in parts(vocab_size, shape.columns)
    )


def waves(rows: int, columns: int, tiles: LogitTiles | ProductTiles, sms: int) -> float:
    """Rounds in which all SMs make a tile of [rows, columns], in tiles of 128 × 256."""
    tile_rows, tile_columns = tiles.area
    count = triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    return triton.cdiv(count, sms) * tile_rows * tile_columns / (128 * 256)


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
