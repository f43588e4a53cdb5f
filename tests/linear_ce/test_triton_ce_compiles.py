"""The cross-entropy kernels compiled: registers, shared memory, instructions."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiling import (
    ARCHITECTURES,
    CompiledKernel,
    KernelRequest,
    compile_kernels,
)

from gift_kernels.linear_ce.triton.chunk_size import MARGIN
from gift_kernels.linear_ce.triton.kernels.logits import Factors, Flags, Pointers, Sizes
from gift_kernels.linear_ce.triton.kernels.matmul import ProductFlags, ProductSizes, RowWeights
from gift_kernels.linear_ce.triton.tiles import (
    DW_TILES,
    HOPPER_TILES,
    LOGIT_TILES,
    PRODUCT_TILES,
    SMALL,
    LogitTiles,
    Machine,
    ProductTiles,
    logit_tiles,
    tiles_for,
)

pytestmark = pytest.mark.xdist_group("cross-entropy kernels compiled")
# Gemma's head with everything that a training step with statistics asks for: the longest epilogue.
ALL_OPTIONS = {"HAS_BIAS": True, "HAS_CAP": True, "ENTROPY": True, "EXPONENTIALS": True}
LOSS = {"HAS_BIAS": False, "HAS_CAP": False, "ENTROPY": False, "EXPONENTIALS": True}
CONFIDENCE = {**LOSS, "EXPONENTIALS": False}
# Types in a tuple's fields, where numbers and tensors stand at a launch.
I32: Any = "i32"
FP32: Any = ["fp32"] * 3
# Every combination with exponentials, which need more registers, and the two extremes without.
OPTIONS = [CONFIDENCE, {**ALL_OPTIONS, "EXPONENTIALS": False}] + [
    LOSS | dict(zip(LOSS, values, strict=False))
    for values in itertools.product((False, True), repeat=3)
]
# What each table of tiles for two heads has most to do for.
GUIDED_OPTIONS = [LOSS, {**LOSS, "HAS_BIAS": True}, {**ALL_OPTIONS, "ENTROPY": False}, ALL_OPTIONS]


def operand(dtype: str, rows: int, columns: int, tma: bool) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"


def logits(
    arch: int,
    tiles: LogitTiles,
    options: dict[str, bool],
    dtype: str = "bf16",
    tma: bool | None = None,
) -> KernelRequest:
    tma = (arch >= 90 and dtype != "fp32") if tma is None else tma
    stored = (tiles.BLOCK_N, tiles.BLOCK_V // tiles.PARTS)
    names: Any = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
    margin = MARGIN[torch.bfloat16][0]
    exp = {"exp": operand(dtype, *stored, tma)} if options["EXPONENTIALS"] else {}
    return KernelRequest(
        kernel="gift_kernels.linear_ce.triton.kernels.logits:_logits_kernel",
        signature={
            "hidden": operand(dtype, tiles.BLOCK_N, tiles.BLOCK_D, tma),
            "head": operand(dtype, tiles.BLOCK_V, tiles.BLOCK_D, tma),
            **exp,
            "ptr": Pointers(f"*{dtype}", "*i32", "*fp32", "*fp32", "*fp32"),
            "count_ptr": "*i32",
            **dict.fromkeys(("first_row", "first_v", "C", "slices"), "i32"),
            "size": Sizes(D=I32, stride_head_v=I32, stride_head_d=1, rows=I32),
            "factor": Factors(*FP32),
        },
        constexprs={
            **({} if exp else {"exp": None}),
            "TILES": tiles,
            "FLAGS": Flags(**options, FINAL=False, MARGIN=margin, TMA=tma, DTYPE=names[dtype]),
        },
        divisible=(
            "first_row", "first_v", "C", "slices", "size.D", "size.stride_head_v", "size.rows",
        ),
        arch=arch,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        label=f"logits-{dtype}-{label(tiles)}-{'-'.join(n.lower() for n in options if options[n])}",
    )  # fmt: skip


def two_heads(
    arch: int, tiles: LogitTiles, options: dict[str, bool], tma: bool | None = None
) -> KernelRequest:
    """`logits` and a guide with the same options in one launch."""
    single = logits(arch, tiles, options, tma=tma)
    signature = dict(single.signature)
    # As many specialisations of the same values under the guide's name.
    signature |= {f"guide_{n}": signature[n] for n in ("hidden", "head", "ptr", "C", "size")}
    signature["guide_factor"] = signature["factor"]
    divisible = list(single.divisible)
    divisible += [f"guide_{n}" for n in divisible if n == "C" or n.startswith("size.")]
    flags = single.constexprs["FLAGS"]
    guide_flags = flags._replace(ENTROPY=False, EXPONENTIALS=False, MARGIN=0.0)
    return replace(
        single,
        kernel="gift_kernels.linear_ce.triton.kernels.logits:_two_heads_kernel",
        signature=signature,
        constexprs={**single.constexprs, "GUIDE_FLAGS": guide_flags},
        divisible=(
            *divisible,
            *(f"guide_{n}" for n in divisible if n[0] in "Cs" and n != "slices"),
        ),
        label=f"guide-and-{single.label.replace('-flat', '')}",
    )


def dh(
    arch: int,
    tiles: ProductTiles,
    dtype: str = "bf16",
    tma: bool | None = None,
    splits: int = 1,
) -> KernelRequest:
    whole = product("dh", arch, tiles, (tiles.BLOCK_M, tiles.BLOCK_K), dtype, tma)
    return replace(
        whole,
        signature={**whole.signature, "N": "i32"},
        constexprs={**whole.constexprs, "SPLITS": splits},
        label=f"{whole.label}{f'-split-{splits}' if splits > 1 else ''}",
    )


def dw(
    arch: int, tiles: ProductTiles, dtype: str = "bf16", tma: bool | None = None
) -> KernelRequest:
    return product("dw", arch, tiles, (tiles.BLOCK_K, tiles.BLOCK_M), dtype, tma)


def dw_stored(arch: int, tiles: ProductTiles, dtype: str = "bf16") -> KernelRequest:
    """dW that nothing is added to: stored once, in the dtype of the head."""
    added = dw(arch, tiles, dtype)
    flags = added.constexprs["FLAGS"]._replace(ACCUMULATE=False)
    return replace(
        added,
        signature={**added.signature, "dw_ptr": f"*{dtype}"},
        constexprs={**added.constexprs, "FLAGS": flags},
        label=added.label.replace("dw-", "dw-stored-"),
    )


def product(
    name: str,
    arch: int,
    tiles: ProductTiles,
    block: tuple[int, int],
    dtype: str,
    tma: bool | None,
) -> KernelRequest:
    """dH or dW, which is first written and then added to."""
    tma = (arch >= 90 and dtype != "fp32") if tma is None else tma
    other, own = {
        "dh": ("head", {"index_ptr": "*i32"}),
        "dw": ("hidden", {"weights": RowWeights("*fp32", "*fp32", "*i32"), "scale_ptr": "*fp32"}),
    }[name]
    sizes = ("D", "stride_other_k", "rows", "columns")
    return KernelRequest(
        kernel=f"gift_kernels.linear_ce.triton.kernels.matmul:_{name}_kernel",
        signature={
            "exp": operand(dtype, *block, tma),
            other: operand(dtype, tiles.BLOCK_K, tiles.BLOCK_D, tma),
            f"{name}_ptr": "*fp32",
            "count_ptr": "*i32",
            **own,
            **dict.fromkeys(("first_row", "first_v", "C"), "i32"),
            "size": ProductSizes(I32, I32, 1, I32, I32),
        },
        constexprs={"TILES": tiles, "FLAGS": ProductFlags(ACCUMULATE=True, TMA=tma)},
        divisible=("first_row", "first_v", "C", *(f"size.{name}" for name in sizes)),
        arch=arch,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        label=f"{name}-{dtype}-{label(tiles)}",
    )


def label(tiles: LogitTiles | ProductTiles) -> str:
    return f"{'x'.join(map(str, tiles[:3]))}{'-flat' if tiles.FLATTEN else ''}"


def requests() -> list[KernelRequest]:
    """Everything that may run for 16-bit heads, and the main path of float32 ones."""
    found = []
    for arch in ARCHITECTURES:
        machine, tma = Machine(arch, 132), arch >= 90
        # Hopper's widest tiles leave few registers. Elsewhere the extremes; of two architectures
        # with the same instructions, all options on the one with less shared memory.
        fewer = [ALL_OPTIONS] if arch in (89, 120) else [LOSS, ALL_OPTIONS]
        for options in OPTIONS if arch == 90 else fewer:
            for tiles in tiles_of(machine, options, tma=tma, guided=False):
                found.append(logits(arch, tiles, options))
        for options in GUIDED_OPTIONS if arch == 90 else [ALL_OPTIONS]:
            tiles = tiles_of(machine, options, tma=tma, guided=True)[0]
            found.append(two_heads(arch, tiles, options))
        for of, table in ((dh, PRODUCT_TILES), (dw, DW_TILES), (dw_stored, DW_TILES)):
            found += [of(arch, tiles) for tiles in tiles_for(table, machine, torch.bfloat16)]
        found.append(dh(arch, tiles_for(PRODUCT_TILES, machine, torch.bfloat16)[0], splits=2))
    # Heads that the copy engine cannot read; the loop's pointers are 64 bits wide.
    hopper = Machine(90, 132)
    for options in (LOSS, ALL_OPTIONS):
        tiles = tiles_of(hopper, options, tma=False, guided=False)[0]
        found.append(logits(90, tiles, options, tma=False))
    guided = tiles_of(hopper, ALL_OPTIONS, tma=False, guided=True)[0]
    found.append(two_heads(90, guided, ALL_OPTIONS, tma=False))
    found.append(two_heads(90, HOPPER_TILES, CONFIDENCE))
    found.append(logits(90, LOGIT_TILES[SMALL][0], ALL_OPTIONS, "fp32"))
    found += [of(90, PRODUCT_TILES[SMALL][0], "fp32") for of in (dh, dw)]
    return found


def tiles_of(
    machine: Machine, options: dict[str, bool], tma: bool, guided: bool, uneven: bool = False
) -> tuple[LogitTiles, ...]:
    """The tiles that a call with these options may run with."""
    return logit_tiles(
        machine,
        torch.bfloat16,
        tma=tma,
        biased=options["HAS_BIAS"],
        capped=options["HAS_CAP"],
        entropy=options["ENTROPY"],
        guided=guided,
        uneven=uneven,
    )


# Of sizes and strides (D, first and second stride of the head): 1, 2 for any other number that is
# no multiple of 16, and 16.
UNEVEN = {
    "D-1": (1, 1, 1),
    "D-1-strides-odd": (1, 2, 2),
    "D-odd": (2, 2, 1),
    "D-odd-transposed": (2, 1, 16),
    "V-odd-transposed": (16, 1, 2),
    "all-odd": (2, 2, 2),
    "transposed": (16, 1, 16),
    "strides-even": (16, 16, 16),
}


def with_sizes(request: KernelRequest, name: str, sizes: tuple[int, int, int]) -> KernelRequest:
    """The same with other values of the integers that Triton specialises."""
    signature: Any = dict(request.signature)
    size = signature["size"]
    fields = ("D", *(field for field in size._fields if field.startswith("stride")))
    given = dict(zip(fields, sizes, strict=True))
    values = {field: 1 if value == 1 else "i32" for field, value in given.items()}
    sides = [side for side in ("size", "guide_size") if side in signature]
    signature |= {side: size._replace(**values) for side in sides}
    # Rows and columns of a chunk are whole tiles, and where a chunk lies is never specialised.
    even = [field for field, value in given.items() if value == 16]
    even += [field for field in ("rows", "columns") if field in size._fields]
    return replace(
        request,
        signature=signature,
        divisible=tuple(f"{side}.{field}" for side in sides for field in even),
        label=f"{request.label}-{name}",
    )


def specialisations() -> list[KernelRequest]:
    """What heads of any sizes and strides make of the kernels, with the tiles that they take."""
    found = []
    for arch in (80, 90):
        machine = Machine(arch, 132)
        for name, sizes in UNEVEN.items():
            for of, table in ((dh, PRODUCT_TILES), (dw, DW_TILES)):
                tiles = tiles_for(table, machine, torch.bfloat16, uneven=True)[0]
                found.append(with_sizes(of(arch, tiles, tma=False), name, sizes))
            tiles = tiles_of(machine, ALL_OPTIONS, tma=False, guided=False, uneven=True)[0]
            found.append(with_sizes(logits(arch, tiles, ALL_OPTIONS, tma=False), name, sizes))
            if name == "D-1":
                found.append(
                    with_sizes(two_heads(arch, tiles, ALL_OPTIONS, tma=False), name, sizes)
                )
    # The copy engine takes multiples of 8.
    sizes = UNEVEN["D-odd"]
    found += [with_sizes(of(90, PRODUCT_TILES[SMALL][0]), "D-8", sizes) for of in (dh, dw)]
    found.append(with_sizes(logits(90, LOGIT_TILES[SMALL][0], ALL_OPTIONS), "D-8", sizes))
    return found


SPECIALISATIONS = specialisations()
REQUESTS = requests()
MATRIX_90 = [r for r in REQUESTS if r.arch == 90 and "bf16" in r.label]


@pytest.fixture(scope="module")
def compiled() -> dict[KernelRequest, CompiledKernel]:
    return dict(zip(REQUESTS, compile_kernels(REQUESTS), strict=True))


def test_sizes_and_strides_that_are_1_or_odd_spill_nothing_and_fit() -> None:
    for kernel in compile_kernels(SPECIALISATIONS):
        kernel.assert_fits()


def test_where_a_chunk_lies_is_never_specialised() -> None:
    """A chunk of 1 column had a kernel of its own, whose operands did not fit."""
    place = ("first_row", "first_v", "C")
    names = {
        dh(90, PRODUCT_TILES[90][0]): (*place, "N"),
        dw(90, DW_TILES[90][0]): place,
        two_heads(90, HOPPER_TILES, LOSS): (*place, "slices", "guide_C"),
    }
    constants = {}
    for request in names:
        for name in names[request]:
            signature = {other: kind for other, kind in request.signature.items() if other != name}
            constexprs = {**request.constexprs, name: 1}
            constants[replace(request, signature=signature, constexprs=constexprs)] = name
    with contextlib.suppress(RuntimeError):
        compile_kernels(list(constants))  # all at once, and below what came of each
    for constant, name in constants.items():
        with pytest.raises(RuntimeError, match=f"arguments \\['{name}'\\] are never specialised"):
            compile_kernels([constant])


def test_at_most_eight_candidates() -> None:
    for table in (LOGIT_TILES, PRODUCT_TILES, DW_TILES):
        assert all(1 <= len(candidates) <= 8 for candidates in table.values())


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_no_spills_and_shared_memory_within_the_limit(
    compiled: dict[KernelRequest, CompiledKernel], request_: KernelRequest
) -> None:
    compiled[request_].assert_fits()
    assert compiled[request_].blocks_per_sm() >= 1


@pytest.mark.parametrize("request_", MATRIX_90, ids=str)
def test_hopper_multiplies_with_wgmma_and_waits_only_where_it_must(
    compiled: dict[KernelRequest, CompiledKernel], request_: KernelRequest
) -> None:
    kernel = compiled[request_]
    assert "wgmma.mma_async" in kernel.ptx
    assert "HGMMA" in kernel.sass
    assert "serialized" not in kernel.log, kernel.log


@pytest.mark.parametrize("request_", MATRIX_90, ids=str)
def test_hopper_moves_tiles_with_the_copy_engine_where_it_can(
    compiled: dict[KernelRequest, CompiledKernel], request_: KernelRequest
) -> None:
    uses = "cp.async.bulk.tensor" in compiled[request_].ptx
    assert uses == request_.constexprs["FLAGS"].TMA


def test_both_heads_of_a_launch_share_one_loop_over_hidden_units(
    compiled: dict[KernelRequest, CompiledKernel],
) -> None:
    """A tile's number picks the operands. An instruction multiplies 16 hidden units."""
    for options in GUIDED_OPTIONS:
        tiles = tiles_of(Machine(90, 132), options, tma=True, guided=True)[0]
        sass = compiled[two_heads(90, tiles, options)].sass
        assert sass.count("HGMMA") == tiles.BLOCK_D / 16
        assert sass.count("UTMALDG") == 2 * tiles.num_stages


def test_both_operands_of_a_step_share_a_barrier(
    compiled: dict[KernelRequest, CompiledKernel],
) -> None:
    """A step waits once for both; E of dW goes to registers, and is waited for alone."""
    for request in MATRIX_90:
        if request.constexprs["FLAGS"].TMA:
            # A wait is tried once in the loop, and again and again in a loop of its own.
            waits = 4 if request.label.startswith("dw") else 2
            assert compiled[request].sass.count("PHASECHK") == waits, request


def test_the_end_of_a_tile_is_short(compiled: dict[KernelRequest, CompiledKernel]) -> None:
    """Tensor cores idle through it. Most tiles hold neither a target nor the last column.

    The kernel whose loops are not joined, for its code holds the end of a tile once.
    """
    tiles = HOPPER_TILES
    logits_of_a_thread = tiles.BLOCK_N * tiles.BLOCK_V / (32 * tiles.num_warps)
    for options, most in ((CONFIDENCE, 6.2), (LOSS, 8.3)):
        count = instructions_after_the_products(compiled[logits(90, tiles, options)].sass)
        assert 4 < count / logits_of_a_thread < most


def instructions_after_the_products(sass: str) -> int:
    """Up to the end of the loop over tiles, on the path that takes every branch forward."""
    lines = [line.strip() for line in sass.splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    at = 1 + max(number for number, line in enumerate(lines) if "HGMMA" in line)
    count = 0
    while "EXIT" not in lines[at]:
        count += lines[at].endswith(";") or "; " in lines[at]
        branch = re.search(r"BRA `\((\.L_\w+)\)", lines[at])
        at = max(at + 1, labels[branch[1]] if branch else 0)
    return count


def test_plain_loads_are_16_bytes_wide_and_64_bit_addressed(
    compiled: dict[KernelRequest, CompiledKernel],
) -> None:
    request = next(r for r in REQUESTS if r.arch == 80 and r.label.startswith("logits"))
    ptx = compiled[request].ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "mul.lo.s64" in ptx or "mad.lo.s64" in ptx or "mul.wide" in ptx
