"""Launches of the merge kernels: how factors are multiplied, tile sizes, and cached launches.

A call is one launch, or two where factors are split first. Python would take longer for them than
the GPU, so the results of Triton's binder and autotuner are cached by kind of call.
"""

import functools
import math
import os
import threading
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.autotuner import Autotuner

from gift_kernels.lora_merge.kernels import Flags, Strides, lora_merge_kernel, split_kernel

AUTOTUNE_VARIABLE = "GIFT_KERNELS_AUTOTUNE"  # "0": no autotuning, always the first configuration
Path = Literal["native", "split", "wide"]


def _config(block_m: int, block_k: int, tiles_m: int, stages: int, num_warps: int) -> triton.Config:
    tiles = {"BLOCK_M": block_m, "BLOCK_K": block_k, "TILES_M": tiles_m, "STAGES": stages}
    return triton.Config(tiles, num_warps=num_warps, num_stages=2)


# Candidates of the autotuner for each way to multiply the factors; the first fits every GPU, the
# third of "split" has enough registers on Hopper only. Those with several stages prefetch the next
# tile; the others rely on other blocks of the same multiprocessor to hide the latency.
_CONFIGS: dict[Path, list[triton.Config]] = {
    "native": [_config(64, 128, 1, 1, 4), _config(128, 128, 1, 1, 8), _config(64, 128, 4, 3, 8)],
    "split": [_config(64, 64, 4, 2, 8), _config(64, 128, 4, 2, 4), _config(64, 128, 4, 1, 4)],
    "wide": [_config(32, 64, 1, 1, 4), _config(64, 64, 1, 1, 8)],
}


SPLIT_BLOCK = 32  # rows of B, or columns of A, that a program splits


def configs(path: Path, stochastic: bool, arch: int) -> list[triton.Config]:
    """The autotuner's candidates on an architecture such as 90."""
    if path != "split":
        return _CONFIGS[path]
    # With random numbers the wide tiles would spill registers.
    return _CONFIGS[path][: 1 if stochastic else 3 if arch == 90 else 2]


def block_r(rank: int, path: Path) -> int:
    """Rows of A that are multiplied at a time; a dot needs 16 at least."""
    if path == "wide":
        return 16
    return max(16, triton.next_power_of_2(rank)) if rank <= 128 else 64


def _autotuning() -> bool:
    return not knobs.runtime.interpret and os.environ.get(AUTOTUNE_VARIABLE) != "0"


@functools.cache
def _autotuned(path: Path, stochastic: bool, in_place: bool, arch: int) -> Any:
    tune = triton.autotune(
        configs(path, stochastic, arch),
        key=["M", "K", "RANK"],
        restore_value=["out_ptr"] if in_place else None,
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=30),
        cache_results=True,
    )
    return tune(lora_merge_kernel)


def _one_adapter(
    lora_a: list[Tensor], lora_b: list[Tensor], scale: list[float]
) -> tuple[Tensor, Tensor, float]:
    """Concatenates adapters along R: A [E, ΣR, K], B [E, M, ΣR] and their common scale."""
    if len(lora_a) == 1:
        return lora_a[0], lora_b[0], scale[0]
    if len(set(scale)) == 1:
        return torch.cat(lora_a, dim=-2), torch.cat(lora_b, dim=-1), scale[0]
    scaled = [b.float() * s for b, s in zip(lora_b, scale, strict=True)]
    return torch.cat(lora_a, dim=-2), torch.cat(scaled, dim=-1), 1.0


def merge(
    weight: Tensor,
    out: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scale: list[float],
    seed: int | None,
    config: triton.Config | None = None,
) -> None:
    """out = round(weight + Σ scale · B A), for valid arguments; `out` may be `weight`.

    Args:
        weight: [M, K] or [E, M, K], bf16, fp16 or fp32, any strides, on CUDA or (interpreted) on
            the CPU.
        out: as `weight`, with its own strides.
        lora_a: [R, K] or [E, R, K] of each adapter, bf16, fp16 or fp32; ranks may differ.
        lora_b: [M, R] or [E, M, R] of each adapter.
        scale: of each adapter.
        seed: of the stochastic rounding to bfloat16; None rounds to nearest.
        config: one of `configs`; None: the autotuner's choice, or the first where there is no
            autotuning (interpreted, or GIFT_KERNELS_AUTOTUNE=0).
    """
    a, b, shared_scale = _one_adapter(lora_a, lora_b, scale)
    if weight.numel() == 0 or a.shape[-2] == 0:
        if out is not weight:
            out.copy_(weight)
        return
    transposed = weight.stride(-1) != 1 and weight.stride(-2) == 1
    if transposed:
        # Merge the transpose, whose rows are contiguous: (W + B A)ᵀ = Wᵀ + Aᵀ Bᵀ.
        weight, out, a, b = weight.mT, out.mT, b.mT, a.mT
    key = (*map(_kind, (weight, out, a, b)), out.data_ptr() == weight.data_ptr(), transposed)
    key = (*key, seed is not None, seed is not None and seed >= 1 << 31, config, _autotuning())
    with torch.cuda.device_of(weight):
        known = _known.get(key) or _prepare(weight, out, a, b, transposed, seed, config)
        if known.split is None:
            split = None
            factors = a.contiguous(), b.contiguous(), None
        else:
            parts = a.new_empty(known.parts, dtype=torch.float16)
            scales = a.new_empty(known.scales, dtype=torch.float32)
            split = known.split(a, b, parts, scales)
            factors = parts, parts, scales
        merge = known.merge(weight, out, *factors, shared_scale, seed or 0)
        if merge is not known.merge:
            _known[key] = known._replace(split=split, merge=merge)


def _kind(x: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor that a launch depends on."""
    return x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0


# An autotuner holds the choice of its latest call, from any thread.
_tuning = threading.Lock()


class Launch(NamedTuple):
    """`kernel[grid](*tensors, *numbers, **options)`."""

    kernel: Any  # jitted, compiled, or an autotuner
    grid: Any
    numbers: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, *tensors: Any) -> "Launch":
        """Launches. Returns the same launch without Triton's binder and autotuner."""
        launch, grid, numbers = self.kernel[self.grid], self.grid, self.numbers
        if isinstance(self.kernel, Autotuner):
            with _tuning:
                compiled = launch(*tensors, *numbers, **self.options)
                tiles = self.kernel.best_config.kwargs
            grid, numbers = grid(tiles), (*numbers, *tiles.values())
        else:
            compiled = launch(*tensors, *numbers, **self.options)
        # None: it is compiled already, or interpreted.
        return self if compiled is None else Launch(compiled, grid, numbers, {})


class Known(NamedTuple):
    """The launches of calls of one kind, and the sizes of the parts of factors."""

    split: Launch | None
    merge: Launch
    parts: int = 0
    scales: int = 0


_known: dict[tuple[Any, ...], Known] = {}


def _prepare(
    weight: Tensor,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    transposed: bool,
    seed: int | None,
    config: triton.Config | None,
) -> Known:
    *expert_shape, rows, columns = weight.shape
    experts, rank = math.prod(expert_shape), a.shape[-2]
    path: Path = "native"
    if a.dtype != b.dtype or a.dtype == torch.float32:
        path = "wide" if weight.dtype == torch.float32 else "split"
    step = block_r(rank, path)
    split, parts, scales = None, 0, experts * (rows + columns)
    if path == "split":
        strides = (_strides(a), _strides(b))
        padded = triton.cdiv(rank, step) * step
        blocks = triton.cdiv(rows, SPLIT_BLOCK) + triton.cdiv(columns, SPLIT_BLOCK)
        numbers = (rows, columns, rank, *strides, padded, SPLIT_BLOCK)
        split = Launch(split_kernel, (experts * blocks, 1, 1), numbers, {"num_warps": 4})
        rank, parts = padded, 2 * padded * scales
    stochastic = seed is not None
    flags = Flags(path == "split", path == "wide", stochastic, transposed and stochastic)
    numbers = (rows, columns, _strides(weight), _strides(out), rank, step, flags)

    def grid(tiles: dict[str, int]) -> tuple[int, int, int]:
        blocks_m = triton.cdiv(rows, tiles["BLOCK_M"] * tiles["TILES_M"])
        return (experts * blocks_m * triton.cdiv(columns, tiles["BLOCK_K"]), 1, 1)

    if config is None and _autotuning():
        major, minor = torch.cuda.get_device_capability() if weight.is_cuda else (0, 0)
        in_place = out.data_ptr() == weight.data_ptr()
        tuner = _autotuned(path, stochastic, in_place, 10 * major + minor)
        return Known(split, Launch(tuner, grid, numbers, {}), parts, scales)
    config = config or _CONFIGS[path][0]
    numbers = (*numbers, *config.kwargs.values())
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    merge = Launch(lora_merge_kernel, grid(config.kwargs), numbers, options)
    return Known(split, merge, parts, scales)


def _strides(matrix: Tensor) -> Strides:
    return Strides(*matrix.stride()) if matrix.dim() == 3 else Strides(0, *matrix.stride())
