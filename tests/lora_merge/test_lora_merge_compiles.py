"""The merge kernel compiled for each architecture: spills, shared memory, instructions."""

import re
from typing import Any, get_args

import pytest
from compiling import (
    ARCHITECTURES,
    CompiledKernel,
    KernelRequest,
    compile_kernels,
    config_options,
)

from gift_kernels.lora_merge.triton import Path, block_r, configs

pytestmark = pytest.mark.xdist_group("merge kernels compiled")
STRIDES = ("stride_w_e", "stride_w_m", "stride_out_e", "stride_out_m")
DTYPES = {"native": ("*bf16", "*bf16"), "split": ("*bf16", "*fp32"), "wide": ("*fp32", "*fp32")}


def _request(
    arch: int,
    path: Path,
    config: Any,
    rank: int,
    stochastic: bool = False,
    transposed: bool = False,
    stride_type: str = "i32",
    **factors: str,
) -> KernelRequest:
    weight, factor = DTYPES[path]
    options = config_options(config)
    tiles = options.pop("constexprs")
    return KernelRequest(
        kernel="gift_kernels.lora_merge.triton:_lora_merge_kernel",
        signature={
            "w_ptr": weight,
            "out_ptr": weight,
            "a_ptr": factor,
            "b_ptr": factor,
            "scale": "fp32",
            "seed": "i64" if stochastic else "i32",
            "M": "i32",
            "K": "i32",
            **dict.fromkeys(STRIDES, stride_type),
            **factors,
        },
        constexprs={
            "stride_w_k": 1,
            "stride_out_k": 1,
            "RANK": rank,
            "BLOCK_R": block_r(rank, path),
            "WIDE": path == "wide",
            "STOCHASTIC": stochastic,
            "TRANSPOSED": transposed,
            **tiles,
        },
        divisible=("M", "K", *STRIDES),
        arch=arch,
        label=f"{path}-r{rank}{'-stochastic' if stochastic else ''}"
        f"{'-transposed' if transposed else ''}"
        f"{''.join(f'-{name}-{kind}' for name, kind in factors.items())}"
        f"-{'x'.join(str(size) for size in tiles.values())}",
        **options,
    )


# With 99 KiB of shared memory the autotuner passes over one configuration for ranks above 64.
NATIVE_RANK = dict.fromkeys(ARCHITECTURES, 128) | {89: 64, 120: 64}
EVERY_CONFIGURATION = [
    _request(arch, path, config, NATIVE_RANK[arch] if path == "native" else 64)
    for arch in ARCHITECTURES
    for path in get_args(Path)
    for config in configs(path, stochastic=False)
]
NATIVE, SPLIT = configs("native", stochastic=True), configs("split", stochastic=True)
VARIANTS = [
    _request(90, "native", NATIVE[0], 8),
    _request(90, "native", NATIVE[1], 512),
    _request(90, "native", NATIVE[0], 64, stride_type="i64"),
    _request(90, "native", NATIVE[2], 64, stochastic=True),
    _request(90, "split", SPLIT[0], 64, stochastic=True),
    *(_request(90, "native", config, 64, True, transposed=True) for config in NATIVE),
    *(_request(90, "split", config, 64, True, transposed=True) for config in SPLIT),
    _request(90, "split", SPLIT[1], 16, b_ptr="*bf16"),
]
REQUESTS = EVERY_CONFIGURATION + VARIANTS


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


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_every_global_access_is_16_bytes_wide(compiled, request_):
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\S*", compiled[request_].sass)
    assert any(a.startswith("STG") for a in accesses)
    assert any(a.startswith("LDG") for a in accesses)
    assert all(".128" in access for access in accesses), accesses


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_products_take_the_units_they_should(compiled, request_):
    ptx = compiled[request_].ptx
    assert "tf32" not in ptx
    products = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    if request_.constexprs["WIDE"]:
        assert not products and "fma.rn.f32" in ptx
        return
    tall = request_.constexprs["BLOCK_M"] >= 64
    fast = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(request_.arch, "mma.sync")
    assert set(products) == {fast if tall else "mma.sync"}


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_staged_configurations_load_the_next_tile_ahead(compiled, request_):
    one_block = request_.constexprs["RANK"] <= request_.constexprs["BLOCK_R"]
    if request_.constexprs["STAGES"] == 1 or not one_block:
        return
    tile = request_.constexprs["BLOCK_M"] * request_.constexprs["BLOCK_K"]
    loads_of_w = tile * 2 // 16 // (32 * request_.num_warps)
    ahead = (request_.constexprs["STAGES"] - 1) * loads_of_w
    assert compiled[request_].ptx.count("cp.async.cg.shared.global") > ahead
