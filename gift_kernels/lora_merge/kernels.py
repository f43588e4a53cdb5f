"""Triton kernels of the LoRA merge: out = round(W + scale · B A), one pass over W.

Letters: E experts, M out, K in, R rank. A program makes TILES_M tiles [BLOCK_M, BLOCK_K] of the
result below one another. Its columns of A stay in registers or shared memory if R ≤ BLOCK_R, so a
tile reads only W and, from L2, a few rows of B. W is read once and the result written once, both
with the evict-first hint: the lower bound is 4 bytes per element for 16-bit weights.

Products are accumulated in float32, the scale multiplies the accumulator (a scaled 16-bit factor
would be rounded once more), and the sum is rounded once. 16-bit factors of one dtype go to the
tensor cores as they are ("native"). All others are split once per call into float16 numbers of 11
bits, a high and a low part ("split", the scheme of Ootomo and Yokota, arXiv 2203.03341):

    x = s (x₀ + x₁) + δ    s a power of two    x₀ = fp16(x / s)    x₁ = fp16(x / s − x₀)

and b a is computed from three products: s_b s_a (b₁ a₀ + b₀ a₁ + b₀ a₀). Every row of B and every
column of A has its own s, which scales its largest entry to [2¹⁴, 2¹⁵), so that |δ| ≤ 2⁻²² |x| +
2⁻³⁹ (largest entry), and an entry of B A is off by at most

    3 · 2⁻²² Σ_r |b_r a_r|  +  R · 2⁻³⁸ (largest |b_r|) (largest |a_r|)

beside the rounding of float32 sums, at the speed of 16-bit products (TF32 runs at half of it).
If W is float32 too, the products are plain float32 instead ("wide"), because the tensor cores' less
exact sums could be visible.

Several adapters become one: factors are concatenated along R, and unless all scales are equal each
scale is multiplied into its own B in float32.

Stochastic rounding adds 16 random bits below the last bit of the bfloat16 and truncates the sum.
The bits are Philox4x32-10 of (row, column // 8, expert) under the seed, whatever the tile sizes and
the strides: for a weight whose columns are contiguous, which is merged as its transpose, the tile's
bits are transposed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16

correct_bfloat16()


class Strides(NamedTuple):
    """Of an expert and of the two dimensions of its matrix."""

    expert: int
    row: int
    column: int


class Flags(NamedTuple):
    """Variants of the kernel. SPLIT: A and B are parts stored by `split_kernel`."""

    SPLIT: bool
    WIDE: bool
    STOCHASTIC: bool
    TRANSPOSED: bool


@triton.jit
def _split(
    x_ptr,
    parts_ptr,
    scale_ptr,
    size,
    strides,
    part_strides,
    block,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Splits a block of x [items, r] into parts [2, items, padded]; size: items, r, padded."""
    stride_x_r, stride_part, stride_part_r = strides[1], part_strides[0], part_strides[2]
    rank, padded = size[1], size[2]
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size[0]
    offs_r = tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + offs[:, None] * strides[0] + offs_r.to(tl.int64)[None, :] * stride_x_r
    high_ptrs = parts_ptr + offs[:, None] * part_strides[1] + offs_r[None, :] * stride_part_r
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rank, BLOCK_R):
        inside = mask[:, None] & (first + offs_r < rank)[None, :]
        x = tl.abs(tl.load(x_ptrs + first * stride_x_r, mask=inside, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.where(x < float("inf"), x, 0.0), 1))
    # 2^-112 keeps the scale and its inverse normal numbers.
    power = tl.maximum(largest, 2.0**-112).to(tl.int32, bitcast=True) & 0x7F800000
    scale = power.to(tl.float32, bitcast=True) * 2.0**-14
    tl.store(scale_ptr + offs, scale, mask=mask)
    for first in range(0, padded, BLOCK_R):
        inside = mask[:, None] & (first + offs_r < rank)[None, :]
        x = tl.load(x_ptrs + first * stride_x_r, mask=inside, other=0.0).to(tl.float32)
        x *= (1.0 / scale)[:, None]
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        tl.store(high_ptrs + first * stride_part_r, high, mask=mask[:, None])
        tl.store(high_ptrs + stride_part + first * stride_part_r, low, mask=mask[:, None])


@triton.jit
def split_kernel(
    a_ptr,  # [E, R, K]
    b_ptr,  # [E, M, R]
    parts_ptr,  # of each expert: of A [2, RANK, K], of B [2, M, RANK], float16
    scales_ptr,  # of each expert: of A [K], of B [M], float32
    M,
    K,
    rank,
    a_strides,
    b_strides,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """High and low parts of both factors over their scales; zeros from `rank` to RANK."""
    blocks_k = tl.cdiv(K, BLOCK)
    blocks = blocks_k + tl.cdiv(M, BLOCK)
    block = tl.program_id(0) % blocks
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    parts_ptr += expert * (2 * RANK) * (M + K)
    scales_ptr += expert * (M + K)
    BLOCK_R: tl.constexpr = min(RANK, 64)
    if block < blocks_k:
        x_ptr = a_ptr + expert * a_strides.expert
        size, strides = (K, rank, RANK), (a_strides.column, a_strides.row)
        part_strides = (tl.cast(K, tl.int64) * RANK, 1, K)
        _split(x_ptr, parts_ptr, scales_ptr, size, strides, part_strides, block, BLOCK, BLOCK_R)
    else:
        x_ptr = b_ptr + expert * b_strides.expert
        parts_ptr += tl.cast(K, tl.int64) * (2 * RANK)
        scales_ptr += K
        size, strides = (M, rank, RANK), (b_strides.row, b_strides.column)
        part_strides = (tl.cast(M, tl.int64) * RANK, RANK, 1)
        block -= blocks_k
        _split(x_ptr, parts_ptr, scales_ptr, size, strides, part_strides, block, BLOCK, BLOCK_R)


@triton.jit
def _load_factor(ptrs, stride_part, mask, SPLIT: tl.constexpr):
    """A tile of a factor, or of its high and low part."""
    high = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last")
    if SPLIT:
        low = tl.load(ptrs + stride_part, mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        low = high
    return high, low


@triton.jit
def _dot(b, b_low, a, a_low, acc, SPLIT: tl.constexpr, WIDE: tl.constexpr):
    """acc + b @ a, small terms first."""
    if WIDE:
        return tl.dot(b.to(tl.float32), a.to(tl.float32), acc, input_precision="ieee")
    if SPLIT:
        acc = tl.dot(b, a_low, tl.dot(b_low, a, acc))
    return tl.dot(b, a, acc)


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
def round_stochastically(x, random_bits):
    bits = (x.to(tl.uint32, bitcast=True) + random_bits) & 0xFFFF0000
    # A NaN's bits may overflow into those of zero.
    return tl.where(x != x, x, bits.to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def lora_merge_kernel(
    w_ptr,  # [E, M, K]
    out_ptr,  # [E, M, K]
    a_ptr,  # [E, R, K] contiguous; if SPLIT, parts as `split_kernel` stores them
    b_ptr,  # [E, M, R] contiguous; if SPLIT, the same parts
    scales_ptr,  # if SPLIT
    scale,
    seed,
    M,
    K,
    w_strides,
    out_strides,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    SPLIT: tl.constexpr = FLAGS.SPLIT
    WIDE: tl.constexpr = FLAGS.WIDE
    # Triton 3.6 loses the constants of a tuple inside a loop.
    stride_w_m, stride_w_k = w_strides.row, w_strides.column
    stride_out_m, stride_out_k = out_strides.row, out_strides.column
    blocks_k = tl.cdiv(K, BLOCK_K)
    blocks_m = tl.cdiv(M, BLOCK_M * TILES_M)
    pid = tl.program_id(0)
    pid_k = pid % blocks_k
    pid_m = (pid // blocks_k) % blocks_m
    expert = pid // (blocks_k * blocks_m)
    w_ptr += expert.to(tl.int64) * w_strides.expert
    out_ptr += expert.to(tl.int64) * out_strides.expert
    part_a, part_b = RANK * tl.cast(K, tl.int64), RANK * tl.cast(M, tl.int64)
    if SPLIT:
        a_ptr += expert * 2 * (part_a + part_b)
        b_ptr += expert * 2 * (part_a + part_b) + 2 * part_a
        scales_ptr += expert.to(tl.int64) * (M + K)
    else:
        a_ptr += expert * part_a
        b_ptr += expert * part_b

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_r = tl.arange(0, BLOCK_R)
    a_ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :]
    if RANK <= BLOCK_R:
        mask_a = (offs_r < RANK)[:, None] & mask_k[None, :]
        a, a_low = _load_factor(a_ptrs, part_a, mask_a, SPLIT)

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
            b, b_low = _load_factor(b_ptrs, part_b, mask_b, SPLIT)
            acc = _dot(b, b_low, a, a_low, acc, SPLIT, WIDE)
        else:
            for first_r in range(0, RANK, BLOCK_R):
                mask_r = first_r + offs_r < RANK
                mask_a = mask_r[:, None] & mask_k[None, :]
                mask_b = mask_m[:, None] & mask_r[None, :]
                a, a_low = _load_factor(a_ptrs + first_r * K, part_a, mask_a, SPLIT)
                b, b_low = _load_factor(b_ptrs + first_r, part_b, mask_b, SPLIT)
                acc = _dot(b, b_low, a, a_low, acc, SPLIT, WIDE)
        if SPLIT:
            a_scale = tl.load(scales_ptr + offs_k, mask=mask_k, other=0.0)
            b_scale = tl.load(scales_ptr + K + offs_m, mask=mask_m, other=0.0)
            # Neither b_scale * a_scale nor acc times one of them need be in the range of float32.
            # Each is cut in two exactly, so that every product stays inside if the result does.
            b_inner = tl.minimum(tl.maximum(b_scale, 2.0**-63), 2.0**63)
            a_inner = tl.minimum(tl.maximum(a_scale, 2.0**-63), 2.0**63)
            b_outer = tl.minimum(b_scale * 2.0**63, 1.0) * tl.maximum(b_scale * 2.0**-63, 1.0)
            a_outer = tl.minimum(a_scale * 2.0**63, 1.0) * tl.maximum(a_scale * 2.0**-63, 1.0)
            acc *= b_inner[:, None] * a_inner[None, :]
            acc *= b_outer[:, None] * a_outer[None, :]
        merged = w.to(tl.float32) + scale * acc
        if FLAGS.STOCHASTIC:
            if FLAGS.TRANSPOSED:
                first_group = (pid_m * TILES_M + tile) * (BLOCK_M // 8)
                offs_group = first_group + tl.arange(0, BLOCK_M // 8)
                random_bits = tl.trans(_random_16_bits(seed, expert, offs_k, offs_group))
            else:
                offs_group = pid_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
                random_bits = _random_16_bits(seed, expert, offs_m, offs_group)
            merged = round_stochastically(merged, random_bits)
        tl.store(
            out_ptr + offs_m[:, None] * stride_out_m + offs_k.to(tl.int64)[None, :] * stride_out_k,
            merged.to(out_ptr.dtype.element_ty),
            mask=mask,
            eviction_policy="evict_first",
        )
