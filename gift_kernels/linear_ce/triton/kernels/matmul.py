"""Products of a chunk of E or dlogits with the head and with the hidden states.

    dH [n, D] (+)= E [n, C] @ W [C, D]          n, the number of valid tokens, is on the device
    dW [C, D] (+)= Eᵀ [C, n] @ H [n, D]

Letters: n valid tokens, C columns of the chunk, D hidden. Operands are 16-bit or float32, sums
float32. Rows of dH are written in the caller's order. Programs are persistent and skip tiles
beyond n. Each output element has one writer and one order of sums: results are deterministic.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16
from gift_kernels.linear_ce.triton.kernels.logits import tile_of

correct_bfloat16()


class ProductFlags(NamedTuple):
    """Which product a launch makes: dH, or with TRANSPOSED dW."""

    TRANSPOSED: bool
    ACCUMULATE: bool
    TMA: bool


class ProductSizes(NamedTuple):
    """Sizes and strides that Triton may specialise; `rows` and `columns` are those of E."""

    D: int
    stride_other_k: int
    stride_other_d: int
    rows: int
    columns: int


@triton.jit
def _product_tile(
    exp,
    other,
    first_m,
    first_d,
    other_row,
    m,
    k,
    size,
    TILES: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """exp (or its transpose) [m, k] @ other[other_row : other_row + k], one tile, float32."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    TRANSPOSED: tl.constexpr = FLAGS.TRANSPOSED
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_d = first_d + tl.arange(0, BLOCK_D)
    if FLAGS.TMA:
        for first in range(0, k, BLOCK_K):
            # Both loads before any use: they then share a barrier.
            e = exp.load([first, first_m] if TRANSPOSED else [first_m, first])
            w = other.load([other_row + first, first_d])
            acc = tl.dot(e.T if TRANSPOSED else e, w, acc)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            e_ptrs = exp + offs_k.to(tl.int64)[None, :] * size.columns + offs_m[:, None]
        else:
            e_ptrs = exp + offs_m.to(tl.int64)[:, None] * size.columns + offs_k[None, :]
        w_ptrs = other + (other_row + offs_k).to(tl.int64)[:, None] * size.stride_other_k
        w_ptrs += offs_d.to(tl.int64)[None, :] * size.stride_other_d
        mask_m = (offs_m < m)[:, None]
        mask_d = (offs_d < size.D)[None, :]
        for first in range(0, k, BLOCK_K):
            mask_k = tl.arange(0, BLOCK_K) < k - first
            e = tl.load(e_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_d, other=0.0)
            acc = tl.dot(e, w, acc, input_precision="ieee")
            if TRANSPOSED:
                e_ptrs += tl.cast(BLOCK_K, tl.int64) * size.columns
            else:
                e_ptrs += BLOCK_K
            w_ptrs += tl.cast(BLOCK_K, tl.int64) * size.stride_other_k
    return acc


@triton.jit
def _add_tile(
    acc,
    out_ptr,
    index_ptr,
    scale,
    out_row,
    first_m,
    first_d,
    m,
    D,
    FLAGS: tl.constexpr,
):
    offs_m = first_m + tl.arange(0, acc.shape[0])
    offs_d = first_d + tl.arange(0, acc.shape[1])
    mask_m = offs_m < m
    if FLAGS.TRANSPOSED:
        rows = (out_row + offs_m).to(tl.int64)
        acc *= scale
    else:
        rows = tl.load(index_ptr + out_row + offs_m, mask=mask_m, other=0).to(tl.int64)
    out_ptrs = out_ptr + rows[:, None] * D + offs_d[None, :]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    if FLAGS.ACCUMULATE:
        acc += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "first_v", "C"])
def _product_kernel(
    exp,  # [rows, columns], or its descriptor
    other,  # head [V, D], or with TRANSPOSED hidden [rows, D]; or its descriptor
    out_ptr,  # dH float32 [N, D], or with TRANSPOSED dW [V, D]; float32 where accumulated
    index_ptr,  # [N] int32: row of dH of each valid token
    count_ptr,  # [1] int32, valid tokens
    scale_ptr,  # [1] factor of dW
    first_row,
    first_v,
    C,
    size,  # ProductSizes
    TILES: tl.constexpr,
    FLAGS: tl.constexpr,
):
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    GROUP_M: tl.constexpr = TILES.GROUP_M
    FLATTEN: tl.constexpr = TILES.FLATTEN
    n = tl.maximum(0, tl.minimum(tl.load(count_ptr) - first_row, size.rows))
    if FLAGS.TRANSPOSED:
        m, k, out_row, other_row = C, n, first_v, 0
        scale = tl.load(scale_ptr)
    else:
        m, k, out_row, other_row = n, C, first_row, first_v
        scale = 1.0
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_d = tl.cdiv(size.D, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_d, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_d = tile_of(tile, tiles_m, tiles_d, GROUP_M)
        first_m, first_d = pid_m * BLOCK_M, pid_d * BLOCK_D
        acc = _product_tile(
            exp, other, first_m, first_d, other_row, m, k, size, TILES, FLAGS
        )  # fmt: skip
        if TILES.PARTS == 1:
            _add_tile(
                acc, out_ptr, index_ptr, scale, out_row, first_m, first_d, m, size.D, FLAGS
            )  # fmt: skip
        else:
            halves = tl.reshape(acc, (BLOCK_M, 2, BLOCK_D // 2)).permute(0, 2, 1).split()
            for half in tl.static_range(2):
                _add_tile(
                    halves[half], out_ptr, index_ptr, scale, out_row, first_m,
                    first_d + half * (BLOCK_D // 2), m, size.D, FLAGS,
                )  # fmt: skip
