"""Products of a chunk of E with the head and, once its rows are weighted, with the hidden states.

    dH [S, n, D] (+)= E [n, C] @ W [C, D]       n, the number of valid tokens, is on the device
    dW [C, D] (+)= (w G)ᵀ [C, n] @ H [n, D]     w G = factor · E, and target_factor at the target

E becomes w G in registers, between shared memory and the tensor cores. dH's product is split over
the columns into S parts with separate sums (split-K), so that few rows keep all SMs busy.

Letters: n valid tokens, C columns of the chunk, D hidden. Operands are 16-bit or float32, sums
float32. Rows of dH are written in the caller's order. Programs are persistent and skip tiles
beyond n. Each output element has one writer and one order of sums: results are deterministic.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16
from gift_kernels.linear_ce.triton.kernels.logits import tile_of

correct_bfloat16()


class ProductFlags(NamedTuple):
    """How a launch reads its operands, and whether it accumulates."""

    ACCUMULATE: bool
    TMA: bool


class ProductSizes(NamedTuple):
    """Sizes and strides that Triton may specialise; `rows` and `columns` are those of E."""

    D: int
    stride_other_k: int
    stride_other_d: int
    rows: int
    columns: int


class RowWeights(NamedTuple):
    """Turn a row of E into dlogits: w G = factor · E, and target_factor at the target."""

    factor: Any  # [rows]
    target_factor: Any  # [rows]
    target: Any  # [rows] int32 rows of this head, −1: none


class Corner(NamedTuple):
    """First row and column of a tile."""

    m: Any
    d: Any


@triton.jit
def _dh_tile(exp, head, corner, first_v, m, start, C, size, TILES: tl.constexpr, TMA: tl.constexpr):
    """exp [m, start : C] @ head[first_v + start : first_v + C], one tile, float32."""
    first_m, first_d = corner.m, corner.d
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if TMA:
        for first_c in range(start, C, BLOCK_K):
            e = exp.load([first_m, first_c])
            acc = tl.dot(e, head.load([first_v + first_c, first_d]), acc)
    else:
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_d = first_d + tl.arange(0, BLOCK_D)
        offs_c = start + tl.arange(0, BLOCK_K)
        e_ptrs = exp + offs_m.to(tl.int64)[:, None] * size.columns + offs_c[None, :]
        w_ptrs = head + (first_v + offs_c).to(tl.int64)[:, None] * size.stride_other_k
        w_ptrs += offs_d.to(tl.int64)[None, :] * size.stride_other_d
        mask_m = (offs_m < m)[:, None]
        mask_d = (offs_d < size.D)[None, :]
        for first_c in range(start, C, BLOCK_K):
            mask_c = offs_c < C - (first_c - start)
            e = tl.load(e_ptrs, mask=mask_m & mask_c[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_c[:, None] & mask_d, other=0.0)
            acc = tl.dot(e, w, acc, input_precision="ieee")
            e_ptrs += BLOCK_K
            w_ptrs += tl.cast(BLOCK_K, tl.int64) * size.stride_other_k
    return acc


@triton.jit
def dlogits(e, weights, first_n, first_v, n):
    """E [BLOCK_K, BLOCK_M] of rows first_n on and columns first_v on as dlogits, in its dtype."""
    offs_n = first_n + tl.arange(0, e.shape[0])
    mask_n = offs_n < n
    factor = tl.load(weights.factor + offs_n, mask=mask_n, other=0.0)[:, None]
    at_target = tl.load(weights.target_factor + offs_n, mask=mask_n, other=0.0)[:, None]
    target = tl.load(weights.target + offs_n, mask=mask_n, other=-1)[:, None] - first_v
    # A factor of 0 gives 0 even where E is NaN: the weight is 0, or there is no row. It also
    # underflows where a chunk's logits are far below the others; the target's term does not use it.
    g = tl.where(factor == 0.0, 0.0, e.to(tl.float32) * factor)
    return tl.where(tl.arange(0, e.shape[1])[None, :] == target, at_target, g).to(e.dtype)


@triton.jit
def _dw_tile(
    exp,
    hidden,
    weights,
    corner,
    first_v,
    n,
    C,
    size,
    TILES: tl.constexpr,
    TMA: tl.constexpr,
):
    """dlogits.T [C, n] @ hidden [n, D], one tile, float32."""
    first_m, first_d = corner.m, corner.d
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if TMA:
        for first_n in range(0, n, BLOCK_K):
            e = exp.load([first_n, first_m])
            h = hidden.load([first_n, first_d])
            g = dlogits(e, weights, first_n, first_v + first_m, n)
            acc = tl.dot(g.T, h, acc)
    else:
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_d = first_d + tl.arange(0, BLOCK_D)
        offs_n = tl.arange(0, BLOCK_K)
        e_ptrs = exp + offs_n.to(tl.int64)[:, None] * size.columns + offs_m[None, :]
        h_ptrs = hidden + offs_n.to(tl.int64)[:, None] * size.stride_other_k
        h_ptrs += offs_d.to(tl.int64)[None, :] * size.stride_other_d
        mask_m = (offs_m < C)[None, :]
        mask_d = (offs_d < size.D)[None, :]
        for first_n in range(0, n, BLOCK_K):
            mask_n = (offs_n < n - first_n)[:, None]
            e = tl.load(e_ptrs, mask=mask_n & mask_m, other=0.0)
            h = tl.load(h_ptrs, mask=mask_n & mask_d, other=0.0)
            g = dlogits(e, weights, first_n, first_v + first_m, n)
            acc = tl.dot(g.T, h, acc, input_precision="ieee")
            e_ptrs += tl.cast(BLOCK_K, tl.int64) * size.columns
            h_ptrs += tl.cast(BLOCK_K, tl.int64) * size.stride_other_k
    return acc


@triton.jit
def _add_tile(acc, out_ptr, rows, first_d, mask_m, D, ACCUMULATE: tl.constexpr):
    """Stores a tile [BLOCK_M, …] in rows [BLOCK_M] of out, or adds it to them."""
    offs_d = first_d + tl.arange(0, acc.shape[1])
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts(
    acc, out_ptr, rows, first_d, mask_m, D, PARTS: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """`_add_tile`, in halves where there are two parts."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    if PARTS == 1:
        _add_tile(acc, out_ptr, rows, first_d, mask_m, D, ACCUMULATE)
    else:
        halves = tl.reshape(acc, (BLOCK_M, 2, HALF)).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _add_tile(halves[half], out_ptr, rows, first_d + half * HALF, mask_m, D, ACCUMULATE)


@triton.jit
def sum_of_parts(ptrs, stride, mask, SPLITS: tl.constexpr):
    """Sum of SPLITS tensors that are `stride` elements apart."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + part * stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["first_row", "first_v", "C", "N"])
def _dh_kernel(
    exp,  # [rows, columns], or its descriptor
    head,  # [V, D], or its descriptor
    dh_ptr,  # [SPLITS, N, D] float32
    index_ptr,  # [N] int32: row of dH of each valid token
    count_ptr,  # [1] int32, valid tokens
    first_row,
    first_v,
    C,
    N,
    size,  # ProductSizes
    TILES: tl.constexpr,
    FLAGS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    FLATTEN: tl.constexpr = TILES.FLATTEN
    n = tl.minimum(tl.load(count_ptr) - first_row, size.rows)
    tiles_m, tiles_d = tl.cdiv(n, BLOCK_M), tl.cdiv(size.D, BLOCK_D)
    tiles = tiles_m * tiles_d
    part_size = tl.cdiv(tl.cdiv(C, SPLITS), TILES.BLOCK_K) * TILES.BLOCK_K
    for number in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=FLATTEN):
        tile, part = number % tiles, number // tiles
        pid_m, pid_d = tile_of(tile, tiles_m, tiles_d, TILES.GROUP_M)
        first_m, first_d = pid_m * BLOCK_M, pid_d * BLOCK_D
        start, end = 0, C
        if SPLITS > 1:
            start, end = part * part_size, tl.minimum(C, (part + 1) * part_size)
        corner = Corner(first_m, first_d)
        acc = _dh_tile(exp, head, corner, first_v, n, start, end, size, TILES, FLAGS.TMA)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        rows = tl.load(index_ptr + first_row + offs_m, mask=offs_m < n, other=0)
        out_ptr = dh_ptr + part.to(tl.int64) * N * size.D
        _add_parts(acc, out_ptr, rows, first_d, offs_m < n, size.D, TILES.PARTS, FLAGS.ACCUMULATE)


@triton.jit(do_not_specialize=["first_row", "first_v", "C"])
def _dw_kernel(
    exp,  # [rows, columns], or its descriptor
    hidden,  # [rows, D], or its descriptor
    dw_ptr,  # [V, D] float32, or the dtype of the head where nothing is added later
    weights,  # RowWeights
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
    FLATTEN: tl.constexpr = TILES.FLATTEN
    n = tl.maximum(0, tl.minimum(tl.load(count_ptr) - first_row, size.rows))
    scale = tl.load(scale_ptr)
    tiles_m, tiles_d = tl.cdiv(C, BLOCK_M), tl.cdiv(size.D, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_d, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_d = tile_of(tile, tiles_m, tiles_d, TILES.GROUP_M)
        first_m, first_d = pid_m * BLOCK_M, pid_d * BLOCK_D
        corner = Corner(first_m, first_d)
        acc = _dw_tile(exp, hidden, weights, corner, first_v, n, C, size, TILES, FLAGS.TMA)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        rows = first_v + offs_m
        _add_parts(
            acc * scale, dw_ptr, rows, first_d, offs_m < C, size.D, TILES.PARTS, FLAGS.ACCUMULATE
        )  # fmt: skip
