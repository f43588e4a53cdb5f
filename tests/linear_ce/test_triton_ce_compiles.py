"""The cross-entropy kernels compiled: registers, shared memory, instructions."""

from __future__ import annotations

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
    shared_memory_limit,
)

from gift_kernels.linear_ce.triton.chunk_size import MARGIN
from gift_kernels.linear_ce.triton.tiles import (
    FLOAT32_TILES,
    HOPPER_TILES,
    LOGIT_TILES,
    PRODUCT_TILES,
    Machine,
    Tiles,
    logit_tiles,
    tile_options,
    tiles_for,
)

pytestmark = pytest.mark.xdist_group("cross-entropy kernels compiled")
# Gemma's head with everything that a training step with statistics asks for: the longest epilogue.
ALL_OPTIONS = {"HAS_BIAS": True, "HAS_CAP": True, "ENTROPY": True, "EXPONENTIALS": True}
LOSS = {"HAS_BIAS": False, "HAS_CAP": False, "ENTROPY": False, "EXPONENTIALS": True}
CONFIDENCE = {**LOSS, "EXPONENTIALS": False}
OPTIONS = [
    dict(zip(LOSS, values, strict=True)) for values in itertools.product((False, True), repeat=4)
]


def operand(dtype: str, rows: int, columns: int, tma: bool) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"


def options_of(tiles: Tiles) -> tuple[dict[str, Any], dict[str, int]]:
    constexprs = tile_options(tiles)
    return constexprs, {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}


def logits(
    arch: int, tiles: Tiles, options: dict[str, bool], dtype: str = "bf16", tma: bool | None = None
) -> KernelRequest:
    tma = (arch >= 90 and dtype != "fp32") if tma is None else tma
    constexprs, launch = options_of(tiles)
    width = tiles.block_n // tiles.parts
    names = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
    return KernelRequest(
        kernel="gift_kernels.linear_ce.triton.kernels.logits:_logits_kernel",
        signature={
            "hidden": operand(dtype, tiles.block_m, tiles.block_k, tma),
            "head": operand(dtype, tiles.block_n, tiles.block_k, tma),
            "bias_ptr": f"*{dtype}",
            "target_ptr": "*i32",
            "ref_ptr": "*fp32",
            "target_logit_ptr": "*fp32",
            "partial_ptr": "*fp32",
            "exp": operand(dtype, tiles.block_m, width, tma and options["EXPONENTIALS"]),
            "count_ptr": "*i32",
            **dict.fromkeys(("first_row", "first_v", "C", "D", "stride_head_v"), "i32"),
            **dict.fromkeys(("inner", "cap", "bits"), "fp32"),
            **dict.fromkeys(("rows", "slices"), "i32"),
        },
        constexprs={
            "stride_head_d": 1,
            "BLOCK_N": tiles.block_m,
            "BLOCK_V": tiles.block_n,
            "BLOCK_D": tiles.block_k,
            **constexprs,
            **options,
            "FINAL": False,
            "MARGIN": MARGIN[torch.bfloat16][0],
            "TMA": tma,
            "DTYPE": names[dtype],
        },
        divisible=("first_row", "first_v", "C", "D", "stride_head_v", "rows", "slices"),
        arch=arch,
        label=f"logits-{dtype}-{label(tiles)}-{'-'.join(n.lower() for n in options if options[n])}",
        **launch,
    )


def two_heads(
    arch: int, tiles: Tiles, options: dict[str, bool], tma: bool | None = None
) -> KernelRequest:
    """`logits` and a guide with the same options in one launch."""
    single = logits(arch, tiles, options, tma=tma)
    signature, constexprs = dict(single.signature), {**single.constexprs, "FLATTEN": False}
    # As many specialisations of the same values under the guide's name.
    signature |= {
        f"guide_{name}": signature[name]
        for name in (
            "hidden", "head", "bias_ptr", "target_ptr", "ref_ptr", "target_logit_ptr",
            "partial_ptr", "C", "D", "inner", "cap", "bits", "slices",
        )
    }  # fmt: skip
    signature["stride_guide_head_v"] = "i32"
    constexprs |= {f"GUIDE_{name}": constexprs[name] for name in ("HAS_BIAS", "HAS_CAP", "TMA")}
    sizes = ("guide_C", "guide_D", "guide_slices", "stride_guide_head_v")
    return replace(
        single,
        kernel="gift_kernels.linear_ce.triton.kernels.logits:_two_heads_kernel",
        signature=signature,
        constexprs={**constexprs, "stride_guide_head_d": 1},
        divisible=(*single.divisible, *sizes),
        label=f"guide-and-{single.label.replace('-flat', '')}",
    )


def product(
    arch: int, tiles: Tiles, transposed: bool, dtype: str = "bf16", tma: bool | None = None
) -> KernelRequest:
    tma = (arch >= 90 and dtype != "fp32") if tma is None else tma
    constexprs, launch = options_of(tiles)
    block = (tiles.block_k, tiles.block_m) if transposed else (tiles.block_m, tiles.block_k)
    return KernelRequest(
        kernel="gift_kernels.linear_ce.triton.kernels.matmul:_product_kernel",
        signature={
            "exp": operand(dtype, *block, tma),
            "other": operand(dtype, tiles.block_k, tiles.block_n, tma),
            "out_ptr": "*fp32",
            "index_ptr": "*i32",
            "count_ptr": "*i32",
            "scale_ptr": "*fp32",
            **dict.fromkeys(("first_row", "first_v", "C", "D", "stride_other_k"), "i32"),
            **dict.fromkeys(("rows", "columns"), "i32"),
        },
        constexprs={
            "stride_other_d": 1,
            "BLOCK_M": tiles.block_m,
            "BLOCK_D": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            **constexprs,
            "TRANSPOSED": transposed,
            "ACCUMULATE": True,
            "TMA": tma,
        },
        divisible=("first_row", "first_v", "C", "D", "stride_other_k", "rows", "columns"),
        arch=arch,
        label=f"{'dW' if transposed else 'dH'}-{dtype}-{label(tiles)}",
        **launch,
    )


def label(tiles: Tiles) -> str:
    return f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}{'-flat' if tiles.flatten else ''}"


def requests() -> list[KernelRequest]:
    """Everything that may run for 16-bit heads, and the main path of float32 ones."""
    found = []
    for arch in ARCHITECTURES:
        machine, tma = Machine(arch, 132), arch >= 90
        # Hopper's widest tiles leave few registers: every combination. Elsewhere the extremes.
        for options in OPTIONS if arch == 90 else (CONFIDENCE, LOSS, ALL_OPTIONS):
            for tiles in tiles_of(machine, options, tma=tma, guided=False):
                found.append(logits(arch, tiles, options))
            if options["EXPONENTIALS"]:
                for tiles in tiles_of(machine, options, tma=tma, guided=True)[:1]:
                    found.append(two_heads(arch, tiles, options))
        products = tiles_for(PRODUCT_TILES, machine, torch.bfloat16)
        found += [product(arch, tiles, transposed=False) for tiles in products]
        found.append(product(arch, products[0], transposed=True))
    # Heads that the copy engine cannot read; the loop's pointers are 64 bits wide.
    hopper = Machine(90, 132)
    for options in (LOSS, ALL_OPTIONS):
        tiles = tiles_of(hopper, options, tma=False, guided=False)[0]
        found.append(logits(90, tiles, options, tma=False))
    guided = tiles_of(hopper, ALL_OPTIONS, tma=False, guided=True)[0]
    found.append(two_heads(90, guided, ALL_OPTIONS, tma=False))
    found.append(two_heads(90, HOPPER_TILES, CONFIDENCE))
    found.append(logits(90, FLOAT32_TILES, ALL_OPTIONS, "fp32"))
    found.append(product(90, FLOAT32_TILES, False, "fp32"))
    return found


def tiles_of(
    machine: Machine, options: dict[str, bool], tma: bool, guided: bool
) -> tuple[Tiles, ...]:
    """The tiles that a call with these options may run with."""
    return logit_tiles(
        machine,
        torch.bfloat16,
        tma=tma,
        biased=options["HAS_BIAS"],
        capped=options["HAS_CAP"],
        entropy=options["ENTROPY"],
        guided=guided,
    )


def odd_sizes(request: KernelRequest, *ones: str) -> KernelRequest:
    """The same with no integer divisible by 16, and some that are 1: other kernels to Triton."""
    signature = {name: kind for name, kind in request.signature.items() if name not in ones}
    return replace(
        request,
        signature=signature,
        constexprs={**request.constexprs, **dict.fromkeys(ones, 1)},
        divisible=(),
        label="-".join((request.label, "odd", *ones)),
    )


def odd_requests() -> list[KernelRequest]:
    """The extremes of what calls with few columns, rows or hidden units specialise."""
    found = []
    for arch in (80, 90, 100):
        machine = Machine(arch, 132)
        tiles = tiles_for(PRODUCT_TILES, machine, torch.bfloat16)[0]
        for transposed in (False, True):
            found.append(odd_sizes(product(arch, tiles, transposed)))
            plain = product(arch, tiles, transposed, tma=False)
            found.append(odd_sizes(plain, "D", "stride_other_k"))
        narrow = tiles_of(machine, LOSS, tma=False, guided=False)[0]
        found.append(odd_sizes(logits(arch, narrow, LOSS, tma=False), "D", "stride_head_v"))
    return found


ODD_REQUESTS = odd_requests()
REQUESTS = requests()
MATRIX_90 = [r for r in REQUESTS if r.arch == 90 and "bf16" in r.label]


@pytest.fixture(scope="module")
def compiled() -> dict[KernelRequest, CompiledKernel]:
    return dict(zip(REQUESTS, compile_kernels(REQUESTS), strict=True))


def test_integers_that_are_1_or_odd_fit_into_shared_memory() -> None:
    for kernel in compile_kernels(ODD_REQUESTS):
        assert kernel.shared <= shared_memory_limit(kernel.request.arch), kernel.request


@pytest.mark.parametrize("name", ["first_row", "first_v", "C"])
def test_where_a_chunk_lies_is_never_specialised(name: str) -> None:
    """A chunk of 1 column had a kernel of its own, whose operands did not fit."""
    tiles = PRODUCT_TILES[90][0]
    with pytest.raises(RuntimeError, match=f"arguments \\['{name}'\\] are never specialised"):
        compile_kernels([odd_sizes(product(90, tiles, False), name)])


def test_at_most_eight_candidates() -> None:
    for table in (LOGIT_TILES, PRODUCT_TILES):
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
    assert uses == request_.constexprs["TMA"]


def test_the_end_of_a_tile_is_short(compiled: dict[KernelRequest, CompiledKernel]) -> None:
    """Tensor cores idle through it. Most tiles hold neither a target nor the last column.

    The kernel whose loops are not joined, for its code holds the end of a tile once.
    """
    tiles = HOPPER_TILES
    logits_of_a_thread = tiles.block_m * tiles.block_n / (32 * tiles.num_warps)
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
