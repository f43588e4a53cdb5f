"""Tile sizes of the matrix kernels, and how their operands are passed.

No timing happens at run time: a first call with few tokens would choose badly for all others, would
compile every candidate, and two processes could round differently. A kernel takes the first entry
of its table; the other entries are candidates for the benchmark, which passes them explicitly.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiles(NamedTuple):
    """A tile [block_m, block_n] of a product over steps of block_k, made by num_warps warps.

    Its epilogue handles `parts` slices of its columns one after another, which bounds registers and
    the shared memory of the store. Row tiles are grouped by `group_m`; `per_sm` programs share an
    SM; `flatten` makes one software pipeline of the loop over tiles and the loop over K.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    parts: int
    per_sm: int
    flatten: bool


class Machine(NamedTuple):
    """What decides on tiles: architecture (0: the interpreter), and number of SMs."""

    arch: int
    sms: int


# Small enough for several tiles in a small test.
INTERPRETER_LOGIT_TILES = Tiles(32, 128, 32, 2, 1, 1, 2, 1, False)
INTERPRETER_PRODUCT_TILES = Tiles(32, 64, 32, 2, 1, 1, 2, 1, False)
FLOAT32_TILES = Tiles(64, 64, 32, 8, 4, 3, 1, 1, False)
# The fastest on an H200. One pipeline over all tiles would serialize the products: the end of a
# tile changes the accumulators where they lie.
HOPPER_TILES = Tiles(128, 256, 64, 8, 8, 4, 2, 1, False)
# Largest first: the arithmetic of a tile grows with its area, its traffic with its perimeter.
LOGIT_TILES = {
    0: (INTERPRETER_LOGIT_TILES,),
    80: (
        Tiles(128, 128, 64, 8, 8, 3, 1, 1, False),
        Tiles(128, 128, 32, 16, 8, 4, 1, 1, False),
    ),
    90: (HOPPER_TILES, Tiles(128, 128, 64, 16, 4, 3, 1, 2, False)),
    100: (Tiles(128, 128, 64, 16, 8, 3, 1, 1, False),),
    # Blackwell without tensor memory: Hopper's copies, Ampere's products, 99 KiB of shared memory.
    120: (Tiles(128, 128, 32, 16, 8, 4, 1, 1, False),),
}
# What spills no register: with a soft-cap; with an entropy, or a soft-cap and a bias; with an
# entropy beside a soft-cap or a guide, or with plain loads.
CAPPED_LOGIT_TILES = LOGIT_TILES | {90: (HOPPER_TILES,)}
LEAN_LOGIT_TILES = LOGIT_TILES | {90: (HOPPER_TILES._replace(block_k=128, num_stages=2),)}
NARROW_LOGIT_TILES = LOGIT_TILES | {90: (Tiles(128, 128, 64, 16, 8, 3, 2, 1, False),)}
PRODUCT_TILES = {
    0: (INTERPRETER_PRODUCT_TILES,),
    80: (Tiles(128, 128, 64, 8, 8, 3, 2, 1, False),),
    90: (
        Tiles(128, 256, 64, 8, 8, 4, 2, 1, False),
        Tiles(128, 256, 64, 16, 8, 3, 2, 1, False),
    ),
    100: (Tiles(128, 256, 64, 8, 8, 3, 2, 1, False),),
    120: (Tiles(128, 128, 32, 8, 8, 4, 2, 1, False),),
}


def machine_of(device: torch.device) -> Machine:
    """The machine that kernels on this device run on."""
    if knobs.runtime.interpret:
        return Machine(0, 2)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.major * 10 + properties.minor, properties.multi_processor_count)


def tiles_for(
    table: dict[int, tuple[Tiles, ...]], machine: Machine, dtype: torch.dtype
) -> tuple[Tiles, ...]:
    """The candidates for this machine, the default first."""
    if machine.arch > 0 and dtype == torch.float32:
        return (FLOAT32_TILES,)
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
) -> tuple[Tiles, ...]:
    """The candidates for the kernels of logits with these options, the default first."""
    table = LOGIT_TILES
    if not tma or (entropy and (guided or capped)):
        table = NARROW_LOGIT_TILES
    elif (entropy or (biased and capped)) and not guided:
        table = LEAN_LOGIT_TILES
    elif capped:
        table = CAPPED_LOGIT_TILES
    return tiles_for(table, machine, dtype)


def can_use_tma(machine: Machine, *matrices: Tensor) -> bool:
    """Whether the copy engine can read these matrices: Hopper on, 16-bit, rows 16-byte aligned."""
    if 0 < machine.arch < 90:
        return False
    return all(
        matrix.element_size() == 2
        and matrix.stride(1) == 1
        and matrix.stride(0) % 8 == 0
        and matrix.data_ptr() % 16 == 0
        and 0 not in matrix.shape
        for matrix in matrices
    )


def operand(matrix: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """The matrix itself, or the descriptor through which the copy engine moves blocks of it."""
    if not tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def tile_options(tiles: Tiles) -> dict[str, Any]:
    """Keyword arguments of a launch that the tile sizes decide, but for the tiles themselves."""
    return {
        "GROUP_M": tiles.group_m,
        "PARTS": tiles.parts,
        "FLATTEN": tiles.flatten,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
