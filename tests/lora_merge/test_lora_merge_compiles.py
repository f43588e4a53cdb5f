"""The merge kernel compiled for each architecture: spills, shared memory, instructions."""

import re
from dataclasses import replace
from typing import Any, get_args

import pytest
from compiling import (
    ARCHITECTURES,
    CompiledKernel,
    KernelRequest,
    compile_kernels,
    config_options,
)

from gift_kernels.lora_merge.kernels import Flags, Strides
from gift_kernels.lora_merge.triton import SPLIT_BLOCK, Path, block_r, configs

pytestmark = pytest.mark.xdist_group("merge kernels compiled")
DTYPES = {"native": ("*bf16", "*bf16"), "split": ("*bf16", "*fp16"), "wide": ("*fp32", "*fp32")}
# K, the strides of rows and of experts are multiples of 16; columns lie side by side.
DIVISIBLE = (
    "M",
    "K",
    *(f"{x}_strides.{which}" for x in ("w", "out") for which in ("expert", "row")),
)


def _request(
    arch: int,
    path: Path,
    config: Any,
    rank: int,
    stochastic: bool = False,
    transposed: bool = False,
    stride_type: str = "i32",
) -> KernelRequest:
    weight, factor = DTYPES[path]
    options = config_options(config)
    tiles = options.pop("constexprs")
    strides: Any = Strides(stride_type, stride_type, 1)
    given = {
        "w_ptr": weight,
        "out_ptr": weight,
        "a_ptr": factor,
        "b_ptr": factor,
        "scales_ptr": "*fp32" if path == "split" else None,
        "scale": "fp32",
        "seed": "i64" if stochastic else "i32",
        "M": "i32",
        "K": "i32",
        "w_strides": strides,
        "out_strides": strides,
    }
    return KernelRequest(
        kernel="gift_kernels.lora_merge.kernels:lora_merge_kernel",
        signature={name: kind for name, kind in given.items() if kind is not None},
        constexprs={
            **{name: kind for name, kind in given.items() if kind is None},
            "RANK": rank,
            "BLOCK_R": block_r(rank, path),
            "FLAGS": Flags(path == "split", path == "wide", stochastic, transposed),
            **tiles,
        },
        divisible=DIVISIBLE,
        arch=arch,
        label=f"{path}-r{rank}{'-stochastic' if stochastic else ''}"
        f"{'-transposed' if transposed else ''}-{stride_type}"
        f"-{'x'.join(str(size) for size in tiles.values())}",
        **options,
    )


def _split_request(arch: int, factor: str, contiguous: bool = True) -> KernelRequest:
    strides: Any = [Strides("i32", "i32", 1), Strides("i32", 1, "i32")][not contiguous]
    which = "row" if contiguous else "column"
    return KernelRequest(
        kernel="gift_kernels.lora_merge.kernels:split_kernel",
        signature={
            **dict.fromkeys(("a_ptr", "b_ptr"), factor),
            "parts_ptr": "*fp16",
            "scales_ptr": "*fp32",
            **dict.fromkeys(("M", "K", "rank"), "i32"),
            **dict.fromkeys(("a_strides", "b_strides"), strides),
        },
        constexprs={"RANK": 64, "BLOCK": SPLIT_BLOCK},
        divisible=(
            "M",
            "K",
            "rank",
            *(f"{x}_strides.{n}" for x in "ab" for n in ("expert", which)),
        ),
        arch=arch,
        label=f"split-{factor}-{'contiguous' if contiguous else 'transposed'}",
    )


# Below sm_90 fragments of A are held in registers: rank 128 takes narrow tiles.
LARGEST = {"native": {80: 128, 89: 64, 90: 128, 100: 128, 120: 64}, "split": {90: 128}}
EVERY_CONFIGURATION = [
    _request(arch, path, config, LARGEST.get(path, {}).get(arch, 64))
    for arch in ARCHITECTURES
    for path in get_args(Path)
    for config in configs(path, False, arch)
]
NATIVE, SPLIT = configs("native", False, 90), configs("split", False, 90)
VARIANTS = [
    *(_request(arch, "split", SPLIT[0], 128) for arch in (80, 89, 100, 120)),
    _request(90, "native", NATIVE[0], 8),
    _request(90, "native", NATIVE[1], 512),
    _request(90, "split", SPLIT[1], 16),
    _request(90, "split", SPLIT[1], 512),
    _request(90, "native", NATIVE[0], 64, stride_type="i64"),
    _request(90, "native", NATIVE[2], 64, stochastic=True),
    _request(90, "split", SPLIT[0], 128, stochastic=True),
    *(_request(90, "native", config, 64, True, transposed=True) for config in NATIVE),
    _request(90, "split", SPLIT[0], 64, True, transposed=True),
]
SPLITS = [
    _split_request(arch, factor, contiguous)
    for arch in (80, 90)
    for factor in ("*fp32", "*bf16")
    for contiguous in (True, False)
]
MERGES = EVERY_CONFIGURATION + VARIANTS


def _with_ones(request: KernelRequest, ones: tuple[str, ...]) -> KernelRequest:
    """The request of a launch where these numbers are 1, which Triton takes as constants."""
    signature: dict[str, Any] = {n: kind for n, kind in request.signature.items() if n not in ones}
    fields = [name.split(".") for name in ones if "." in name]
    for name, field in fields:
        signature[name] = signature[name]._replace(**{field: 1})
    return replace(
        request,
        signature=signature,
        constexprs={**request.constexprs, **{name: 1 for name in ones if "." not in name}},
        divisible=tuple(name for name in request.divisible if name not in ones),
        label=f"{request.label}-{'-'.join(ones)}-1",
    )


ONES = [
    *(
        _with_ones(_request(90, path, configs(path, False, 90)[0], 64), ones)
        for path in get_args(Path)
        for ones in (("M",), ("K",), ("M", "K"), ("K", "w_strides.row", "out_strides.row"))
    ),
    *(_with_ones(_split_request(90, "*fp32"), ones) for ones in (("M",), ("K", "rank"))),
]
REQUESTS = MERGES + SPLITS + ONES


@pytest.fixture(scope="module")
def compiled() -> dict[KernelRequest, CompiledKernel]:
    return dict(zip(REQUESTS, compile_kernels(REQUESTS), strict=True))


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_no_register_is_spilled_and_shared_memory_suffices(compiled, request_):
    kernel = compiled[request_]
    kernel.assert_fits()
    assert kernel.stack == 0, kernel.log
    assert kernel.blocks_per_sm() >= 1
    assert "Performance" not in kernel.log, kernel.log


@pytest.mark.parametrize("request_", MERGES, ids=str)
def test_every_global_access_is_16_bytes_wide(compiled, request_):
    """But for the scales of split factors, a few numbers of each row and column of a tile."""
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\S*", compiled[request_].sass)
    assert any(a.startswith("STG") for a in accesses)
    assert any(a.startswith("LDG") for a in accesses)
    narrow = [access for access in accesses if ".128" not in access]
    assert not any(access.startswith("STG") for access in narrow)
    assert len(narrow) <= (20 if request_.constexprs["FLAGS"].SPLIT else 0), narrow


@pytest.mark.parametrize("request_", MERGES, ids=str)
def test_products_take_the_units_they_should(compiled, request_):
    ptx = compiled[request_].ptx
    assert "tf32" not in ptx
    products = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    if request_.constexprs["FLAGS"].WIDE:
        assert not products and "fma.rn.f32" in ptx
        return
    tall = request_.constexprs["BLOCK_M"] >= 64
    fast = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(request_.arch, "mma.sync")
    assert set(products) == {fast if tall else "mma.sync"}


@pytest.mark.parametrize("request_", MERGES, ids=str)
def test_staged_configurations_load_the_next_tile_ahead(compiled, request_):
    one_block = request_.constexprs["RANK"] <= request_.constexprs["BLOCK_R"]
    if request_.constexprs["STAGES"] == 1 or not one_block:
        return
    tile = request_.constexprs["BLOCK_M"] * request_.constexprs["BLOCK_K"]
    loads_of_w = tile * 2 // 16 // (32 * request_.num_warps)
    ahead = (request_.constexprs["STAGES"] - 1) * loads_of_w
    assert compiled[request_].ptx.count("cp.async.cg.shared.global") > ahead
