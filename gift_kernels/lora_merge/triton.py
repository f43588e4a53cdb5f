"""Triton kernel of the LoRA merge: out = round(W + scale · B A), one pass over W.

Letters: E experts, M out, K in, R rank. A program makes TILES_M tiles [BLOCK_M, BLOCK_K] of the
result below one another. Its columns of A stay on the multiprocessor if R ≤ BLOCK_R, so a
tile reads only W and a few rows of B from L2. W is read once and the result written once, both with
the evict-first hint: the lower bound is 4 bytes per element for 16-bit weights.

Products are accumulated in float32, the scale multiplies the accumulator (a scaled 16-bit factor
would be rounded once more), and the sum is rounded once. 16-bit factors go to the tensor cores as
they are. A float32 factor x is the sum of three bfloat16 numbers of 8 bits each,

    x = x₀ + x₁ + x₂    x₀ = bf16(x)    x₁ = bf16(x − x₀)    x₂ = x − x₀ − x₁

so its product needs the pairs x_i y_j with i + j ≤ 2 only: three products if the other factor is
bfloat16 (nothing is dropped), six if it is float32 (at most 2⁻²³ |x y| is dropped, 2⁻²⁸ as a rule).
This gives float32 accuracy at tensor core speed; TF32 has only 11 bits. If W is float32 too, the
products are plain float32 instead, because the tensor cores' less exact sums could be visible.

Several adapters become one: factors are concatenated along R, and unless all scales are equal each
scale is multiplied into its own B in float32.

Stochastic rounding adds 16 random bits below the last bit of the bfloat16 and truncates the sum.
The bits are Philox4x32-10 of (row, column // 8, expert) under the seed, whatever the tile sizes and
the strides: for a weight whose columns are contiguous, which is merged as its transpose, the tile's
bits are transposed.
"""

import functools
import os
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from gift_kernels.interpreter import correct_bfloat16

correct_bfloat16()

AUTOTUNE_VARIABLE = "GIFT_KERNELS_AUTOTUNE"  # "0": always the first configuration
Path = Literal["native", "split", "wide"]


def _config(block_m: int, block_k: int, tiles_m: int, stages: int, num_warps: int) -> triton.Config:
    tiles = {"BLOCK_M": block_m, "BLOCK_K": block_k, "TILES_M": tiles_m, "STAGES": stages}
    return triton.Config(tiles, num_warps=num_warps, num_stages=2)


# Candidates of the autotuner for each way to multiply the factors, eight in all. Those with several
# tiles and stages load the next tile of W while they compute; the others rely on the other blocks
# of the same multiprocessor to hide the latency.
_CONFIGS: dict[Path, list[triton.Config]] = {
    "native": [
        _config(64, 128, 1, 1, 4),
        _config(128, 128, 1, 1, 8),
        _config(64, 128, 4, 3, 8),
        _config(32, 128, 8, 3, 4),
    ],
    "split": [_config(64, 64, 8, 3, 4), _config(128, 64, 1, 1, 8)],
    "wide": [_config(32, 64, 1, 1, 4), _config(64, 64, 1, 1, 8)],
}


def configs(path: Path, stochastic: bool) -> list[triton.Config]:
    """What the autotuner may choose."""
    # With random numbers the last one of "native" would not fit in the registers.
    return _CONFIGS[path][:3] if stochastic else _CONFIGS[path]


def block_r(rank: int, path: Path) -> int:
    """Rows of A that are multiplied at a time; a dot needs 16 at least."""
    if path != "native":
        return 16
    return max(16, triton.next_power_of_2(rank)) if rank <= 128 else 64


@triton.jit
def _split(x):
    """Three bfloat16 tensors whose sum is x."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(b, a, acc, WIDE: tl.constexpr):
    """acc + b @ a. Small terms come first."""
    if WIDE:
        acc = tl.dot(b.to(tl.float32), a.to(tl.float32), acc, input_precision="ieee")
    elif b.dtype == a.dtype and b.dtype != tl.float32:
        acc = tl.dot(b, a, acc)
    elif a.dtype == tl.bfloat16:
        b0, b1, b2 = _split(b)
        acc = tl.dot(b0, a, tl.dot(b1, a, tl.dot(b2, a, acc)))
    elif b.dtype == tl.bfloat16:
        a0, a1, a2 = _split(a)
        acc = tl.dot(b, a0, tl.dot(b, a1, tl.dot(b, a2, acc)))
    else:
        b0, b1, b2 = _split(b)
        a0, a1, a2 = _split(a)
        acc = tl.dot(b0, a2, tl.dot(b1, a1, tl.dot(b2, a0, acc)))
        acc = tl.dot(b0, a0, tl.dot(b0, a1, tl.dot(b1, a0, acc)))
    return acc


@triton.jit
def _random_16_bits(seed, expert, offs_m, offs_group):
    """Random integers below 2**16, [BLOCK_M, 8 * groups]: eight of one Philox call."""
    row = offs_m.to(tl.int32)[:, None] + 0 * offs_group[None, :]
    group = offs_group[None, :] + 0 * row
    r0, r1, r2, r3 = tl.philox(seed, row, group, expert + 0 * row, 0 * row)
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    words = tl.reshape(words, (row.shape[0], row.shape[1] * 4))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (row.shape[0], row.shape[1] * 8))


@triton.jit
def _round_stochastically(x, random_bits):
    bits = (x.to(tl.uint32, bitcast=True) + random_bits) & 0xFFFF0000
    # A NaN's bits may overflow into those of zero.
    return tl.where(x != x, x, bits.to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def _lora_merge_kernel(
    w_ptr,  # [E, M, K]
    out_ptr,  # [E, M, K]
    a_ptr,  # [E, R, K] contiguous
    b_ptr,  # [E, M, R] contiguous
    scale,
    seed,
    M,
    K,
    stride_w_e,
    stride_w_m,
    stride_w_k,
    stride_out_e,
    stride_out_m,
    stride_out_k,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_k = tl.cdiv(K, BLOCK_K)
    blocks_m = tl.cdiv(M, BLOCK_M * TILES_M)
    pid = tl.program_id(0)
    pid_k = pid % blocks_k
    pid_m = (pid // blocks_k) % blocks_m
    expert = pid // (blocks_k * blocks_m)
    w_ptr += expert.to(tl.int64) * stride_w_e
    out_ptr += expert.to(tl.int64) * stride_out_e
    a_ptr += expert.to(tl.int64) * RANK * K
    b_ptr += expert.to(tl.int64) * RANK * M

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_r = tl.arange(0, BLOCK_R)
    a_ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :]
    if RANK <= BLOCK_R:
        mask_a = (offs_r < RANK)[:, None] & mask_k[None, :]
        a = tl.load(a_ptrs, mask=mask_a, other=0.0, eviction_policy="evict_last")

    for tile in tl.range(0, TILES_M, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        offs_m = (pid_m * TILES_M + tile).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_k[None, :]
        w_ptrs = w_ptr + offs_m[:, None] * stride_w_m + offs_k.to(tl.int64)[None, :] * stride_w_k
        w = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        b_ptrs = b_ptr + offs_m[:, None] * RANK + offs_r[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if RANK <= BLOCK_R:
            mask_b = mask_m[:, None] & (offs_r < RANK)[None, :]
            b = tl.load(b_ptrs, mask=mask_b, other=0.0, eviction_policy="evict_last")
            acc = _dot(b, a, acc, WIDE)
        else:
            for first_r in range(0, RANK, BLOCK_R):
                mask_r = first_r + offs_r < RANK
                mask_a = mask_r[:, None] & mask_k[None, :]
                a = tl.load(a_ptrs + first_r * K, mask=mask_a, other=0.0)
                b = tl.load(b_ptrs + first_r, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
                acc = _dot(b, a, acc, WIDE)
        merged = w.to(tl.float32) + scale * acc
        out_ptrs = (
            out_ptr + offs_m[:, None] * stride_out_m + offs_k.to(tl.int64)[None, :] * stride_out_k
        )
        if STOCHASTIC:
            if TRANSPOSED:
                first_group = (pid_m * TILES_M + tile) * (BLOCK_M // 8)
                offs_group = first_group + tl.arange(0, BLOCK_M // 8)
                random_bits = tl.trans(_random_16_bits(seed, expert, offs_k, offs_group))
            else:
                offs_group = pid_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
                random_bits = _random_16_bits(seed, expert, offs_m, offs_group)
            merged = _round_stochastically(merged, random_bits)
        tl.store(
            out_ptrs,
            merged.to(out_ptr.dtype.element_ty),
            mask=mask,
            eviction_policy="evict_first",
        )


def _autotuning() -> bool:
    return not knobs.runtime.interpret and os.environ.get(AUTOTUNE_VARIABLE) != "0"


@functools.cache
def _autotuned(path: Path, stochastic: bool, in_place: bool) -> Any:
    tune = triton.autotune(
        configs(path, stochastic),
        key=["M", "K", "RANK"],
        restore_value=["out_ptr"] if in_place else None,
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=30),
        cache_results=True,
    )
    return tune(_lora_merge_kernel)


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
        weight: [E, M, K] bf16, fp16 or fp32, any strides, on CUDA or (interpreted) on the CPU.
        out: as `weight`, with its own strides.
        lora_a: [E, R, K] of each adapter, bf16, fp16 or fp32; ranks may differ.
        lora_b: [E, M, R] of each adapter.
        scale: of each adapter.
        seed: of the stochastic rounding to bfloat16; None rounds to nearest.
        config: one of `configs`; None: the autotuner's choice, or the first where there is no
            autotuning (interpreted, or GIFT_KERNELS_AUTOTUNE=0).
    """
    a, b, shared_scale = _one_adapter(lora_a, lora_b, scale)
    rank = a.shape[-2]
    if weight.numel() == 0 or rank == 0:
        if out is not weight:
            out.copy_(weight)
        return
    transposed = weight.stride(-1) != 1 and weight.stride(-2) == 1
    if transposed:
        # Merge the transpose, whose rows are contiguous: (W + B A)ᵀ = Wᵀ + Aᵀ Bᵀ.
        weight, out, a, b = weight.mT, out.mT, b.mT, a.mT
    if a.dtype != b.dtype and torch.float16 in (a.dtype, b.dtype):
        a, b = a.float(), b.float()
    factors = (a.contiguous(), b.contiguous())
    _launch(weight, out, *factors, shared_scale, seed, transposed, config)


def _launch(
    weight: Tensor,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: int | None,
    transposed: bool,
    config: triton.Config | None,
) -> None:
    experts, rows, columns = weight.shape
    rank = a.shape[-2]
    path: Path = "native"
    if torch.float32 in (a.dtype, b.dtype):
        path = "wide" if weight.dtype == torch.float32 else "split"
    kernel: Any = _lora_merge_kernel
    chosen: dict[str, Any] = {}
    if config is None and _autotuning():
        kernel = _autotuned(path, seed is not None, out.data_ptr() == weight.data_ptr())
    else:
        config = config or _CONFIGS[path][0]
        chosen = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}

    def grid(meta: dict[str, int]) -> tuple[int]:
        tall = meta["BLOCK_M"] * meta["TILES_M"]
        return (experts * triton.cdiv(rows, tall) * triton.cdiv(columns, meta["BLOCK_K"]),)

    with torch.cuda.device_of(weight):
        kernel[grid](
            weight,
            out,
            a,
            b,
            scale,
            seed or 0,
            rows,
            columns,
            *weight.stride(),
            *out.stride(),
            RANK=rank,
            BLOCK_R=block_r(rank, path),
            WIDE=path == "wide",
            STOCHASTIC=seed is not None,
            TRANSPOSED=transposed and seed is not None,
            **chosen,
        )
