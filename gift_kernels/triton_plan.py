"""How a call is divided: sizes of chunks, who multiplies, with which tiles, and margins of E.

A chunk has at most `rows` × `columns` logits, or their exponentials E; see `triton_chunk`.
"""

import math
from typing import Literal, NamedTuple

import torch

from gift_kernels.problem import Head
from gift_kernels.triton_tiles import (
    PRODUCT_TILES,
    Machine,
    Tiles,
    can_use_tma,
    logit_tiles,
    machine_of,
    tiles_for,
)

# E in 16 bits: 96 MiB. Rows: the output [2048, D] of E W is two waves of tiles at D 4096, and the
# head is read from memory N / 2048 times; columns: dH is read and written V / 24576 times.
ROWS, COLUMNS = 2048, 24576
# Where dW is made, 84 MiB: many rows, for dW is read and written once for each chunk of rows.
HEAD_ROWS, HEAD_COLUMNS = 8192, 5376
INTERPRETER_ROWS, INTERPRETER_COLUMNS = 64, 256
# Where nothing is stored but the partial sums of all columns.
STATISTICS_ROWS = 4096
ROW_BLOCK = (4, 1024)  # rows and columns at a time where rows are copied or scaled
INTERPRETER_ROW_BLOCK = (16, 64)
# How far logits, in base 2, may exceed the reference of their exponentials, and how far below its
# guess that is put. float16 reaches from 2^−24 to 2^16; bfloat16 and float32 from 2^−126 to 2^128.
MARGIN = {torch.float16: (13.5, 10.0), torch.bfloat16: (63.0, 0.0), torch.float32: (63.0, 0.0)}


class Plan(NamedTuple):
    """Sizes of a chunk, who multiplies (Triton or PyTorch's library), and with which tiles."""

    machine: Machine
    rows: int
    columns: int
    logits: Literal["triton", "library"]
    products: Literal["triton", "library"]
    head_rows: int
    head_columns: int
    statistics_rows: int
    logit_tiles: Tiles
    product_tiles: Tiles
    row_block: tuple[int, int]


def default_plan(head: Head, guide: Head | None = None, *, with_entropy: bool = False) -> Plan:
    """What `impl="triton"` uses on the device of this head, or of two heads in one launch."""
    machine = machine_of(head.hidden.device)
    dtype = head.hidden.dtype
    interpreted = machine.arch == 0
    share = 2 / dtype.itemsize
    heads = [one for one in (head, guide) if one is not None]
    tiles = logit_tiles(
        machine,
        dtype,
        # A chunk's own rows are aligned if D is a multiple of 8.
        tma=all(can_use_tma(machine, h.weight) and h.weight.shape[1] % 8 == 0 for h in heads),
        capped=any(h.logit_softcap is not None for h in heads),
        entropy=with_entropy,
        guided=guide is not None,
    )
    return Plan(
        machine,
        INTERPRETER_ROWS if interpreted else ROWS,
        INTERPRETER_COLUMNS if interpreted else int(COLUMNS * share),
        "triton",
        "triton",
        INTERPRETER_ROWS if interpreted else HEAD_ROWS,
        INTERPRETER_COLUMNS if interpreted else int(HEAD_COLUMNS * share),
        INTERPRETER_ROWS if interpreted else STATISTICS_ROWS,
        tiles[0],
        tiles_for(PRODUCT_TILES, machine, dtype)[0],
        INTERPRETER_ROW_BLOCK if interpreted else ROW_BLOCK,
    )


def logit_factors(head: Head, temperature: float) -> tuple[float, float]:
    """inner and outer of x = outer · tanh(inner · a), or of x = outer · a; x is in base 2."""
    unit = math.log(2) * temperature
    if head.logit_softcap is None:
        return 1.0, head.logit_scale / unit
    cap = head.logit_softcap
    return head.logit_scale / cap, cap / unit
