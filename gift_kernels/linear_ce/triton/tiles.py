"""Tile sizes of the matrix kernels, and how their operands are passed.

There is no autotuning: a first call with few tokens would choose badly for all others and compile
every candidate, and two processes could round differently. A kernel takes the first entry of its
table; the other entries are candidates for the benchmark, which passes them explicitly.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor


class LogitTiles(NamedTuple):
    """A tile of logits: BLOCK_N rows by BLOCK_V columns of the vocabulary, in steps of BLOCK_D.

    Its epilogue handles the columns in PARTS parts, 1 or 2, which bounds registers and the shared
    memory of the store. GROUP_M row tiles run one after another with one tile of the head
    (swizzle); FLATTEN merges the loops over tiles and over D into one software pipeline. `per_sm`
    programs of num_warps warps share an SM. Kernels receive the tuple itself.
    """

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    PARTS: int
    per_sm: int
    FLATTEN: bool

    @property
    def area(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.BLOCK_N, self.BLOCK_V


class ProductTiles(NamedTuple):
    """As `LogitTiles` for dH [n, D] and dW [V, D]: BLOCK_M of their rows, in steps of BLOCK_K."""

    BLOCK_M: int
    BLOCK_D: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    PARTS: int
    per_sm: int
    FLATTEN: bool

    @property
    def area(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.BLOCK_M, self.BLOCK_D


AnyTiles = TypeVar("AnyTiles", LogitTiles, ProductTiles)


class Machine(NamedTuple):
    """The properties that tiles depend on: architecture (0: the interpreter) and number of SMs."""

    arch: int
    sms: int


# Keys of the tables below: architectures, the interpreter, and on any GPU float32 or uneven sizes.
INTERPRETER, SMALL = 0, -1
# The fastest candidate on an H200 with the kernels of commit c35b29c; not timed with later ones.
# FLATTEN would serialize the products, because the epilogue changes the accumulators in place.
# Its limits: docs/kernel-design.md, Tiles.
HOPPER_TILES = LogitTiles(128, 256, 64, 8, 8, 4, 2, 1, False)
# Largest first: the arithmetic of a tile grows with its area, its traffic with its perimeter. The
# interpreter's are small enough for several tiles in a small test.
LOGIT_TILES = {
    SMALL: (LogitTiles(64, 64, 32, 8, 4, 3, 1, 1, False),),
    INTERPRETER: (LogitTiles(32, 128, 32, 2, 1, 1, 2, 1, False),),
    80: (
        LogitTiles(128, 128, 64, 8, 8, 3, 1, 1, False),
        LogitTiles(128, 128, 32, 16, 8, 4, 1, 1, False),
    ),
    90: (HOPPER_TILES, LogitTiles(128, 128, 64, 16, 4, 3, 1, 2, False)),
    100: (LogitTiles(128, 128, 64, 16, 8, 3, 1, 1, False),),
    # Blackwell without tensor memory: Hopper's copies, Ampere's products, 99 KiB of shared memory.
    120: (LogitTiles(128, 128, 32, 16, 8, 4, 1, 1, False),),
}
# None of these spills. CAPPED: with a soft-cap. LEAN: with an entropy, or a soft-cap and a bias.
# NARROW: with an entropy and a soft-cap or a guide, or with plain loads.
CAPPED_LOGIT_TILES = LOGIT_TILES | {90: (HOPPER_TILES,)}
LEAN_LOGIT_TILES = LOGIT_TILES | {90: (HOPPER_TILES._replace(BLOCK_D=128, num_stages=2),)}
NARROW_LOGIT_TILES = LOGIT_TILES | {
    90: (LogitTiles(128, 128, 64, 16, 8, 3, 2, 1, False),),
    120: (LogitTiles(128, 64, 32, 16, 8, 4, 1, 1, False),),
}
PRODUCT_TILES = {
    SMALL: (ProductTiles(64, 64, 32, 8, 4, 3, 1, 1, False),),
    INTERPRETER: (ProductTiles(32, 64, 32, 2, 1, 1, 2, 1, False),),
    80: (ProductTiles(128, 128, 64, 8, 8, 3, 2, 1, False),),
    90: (
        ProductTiles(128, 256, 64, 8, 8, 3, 2, 1, True),
        ProductTiles(128, 256, 64, 8, 8, 4, 2, 1, False),
    ),
    100: (ProductTiles(128, 256, 64, 8, 8, 3, 2, 1, False),),
    120: (ProductTiles(128, 128, 32, 8, 8, 4, 2, 1, False),),
}

# Weights enter dW in registers: wider tiles spill on 80 and 100, joined loops are serialized on 90.
DW_TILES = PRODUCT_TILES | {
    80: (ProductTiles(128, 128, 32, 8, 8, 4, 2, 1, False),),
    90: (
        ProductTiles(128, 256, 64, 8, 8, 4, 2, 1, False),
        ProductTiles(128, 256, 64, 8, 8, 3, 2, 1, False),
    ),
    100: (ProductTiles(128, 128, 64, 8, 8, 4, 2, 1, False),),
}


def machine_of(device: torch.device) -> Machine:
    """The machine that kernels on this device run on."""
    if knobs.runtime.interpret:
        return Machine(0, 2)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.major * 10 + properties.minor, properties.multi_processor_count)


def tiles_for(
    table: dict[int, tuple[AnyTiles, ...]],
    machine: Machine,
    dtype: torch.dtype,
    *,
    uneven: bool = False,
) -> tuple[AnyTiles, ...]:
    """The candidates for this machine, default first.

    `uneven` as in `is_uneven`: each address then takes separate registers.
    """
    if machine.arch > 0 and (uneven or dtype == torch.float32):
        return table[SMALL]
    known = [arch for arch in table if min(1, machine.arch) <= arch <= machine.arch]
    return table[max(known)]


def logit_tiles(
    machine: Machine,
    dtype: torch.dtype,
    *,
    tma: bool,
    biased: bool,
    capped: bool,
    entropy: bool,
    guided: bool,
    uneven: bool = False,
) -> tuple[LogitTiles, ...]:
    """The candidates for the kernels of logits with these options, the default first."""
    table = LOGIT_TILES
    if not tma or (entropy and (guided or capped)):
        table = NARROW_LOGIT_TILES
    elif (entropy or (biased and capped)) and not guided:
        table = LEAN_LOGIT_TILES
    elif capped:
        table = CAPPED_LOGIT_TILES
    return tiles_for(table, machine, dtype, uneven=uneven)


def is_uneven(matrix: Tensor) -> bool:
    """Whether rows are not contiguous, or their length or distance is no multiple of 16."""
    return matrix.stride(1) != 1 or matrix.shape[1] % 16 != 0 or matrix.stride(0) % 16 != 0


def can_use_tma(machine: Machine, *matrices: Tensor) -> bool:
    """Whether TMA can read these matrices: Hopper and newer, 16-bit, rows 16-byte aligned."""
    if 0 < machine.arch < 90:
        return False
    # The interpreter of Triton 3.5 requires 16 elements where 16 bytes are enough.
    step = 8 if machine.arch > 0 else 16
    return all(
        matrix.element_size() == 2
        and matrix.stride(1) == 1
        and matrix.stride(0) % step == 0
        and matrix.data_ptr() % 16 == 0
        and 0 not in matrix.shape
        for matrix in matrices
    )


def operand(matrix: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """The matrix itself, or its TMA descriptor for blocks."""
    if not tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))
