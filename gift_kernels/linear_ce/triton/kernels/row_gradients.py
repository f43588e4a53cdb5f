"""Row-wise kernels of the gradients: scaling of dH, and db.

Letters: N rows of the caller, D hidden, `rows` and `columns` of a chunk's buffer E, C of these
columns in use; w G as in `matmul`.
"""

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16
from gift_kernels.linear_ce.triton.kernels.matmul import dlogits, sum_of_parts

correct_bfloat16()


@triton.jit
def _finish_dh_kernel(
    dh_ptr,  # [SPLITS, N, D] with the sum Σ E W; the first becomes dH
    head_ptr,  # [V, D]
    place_ptr,  # [N] int32
    local_target_ptr,  # [N] int32 by valid token
    factor_ptr,  # [N]
    target_factor_ptr,  # [N]
    N,
    D,
    stride_head_v,
    stride_head_d,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dH = factor · ΣE W + target_factor · W_y, the latter in float32; 0 on rows left out."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    steps = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    mask_n = rows < N
    mask = mask_n[:, None] & (steps < D)
    place = tl.load(place_ptr + rows, mask=mask_n, other=-1)
    counted = place >= 0
    target = tl.load(local_target_ptr + place, mask=counted, other=-1).to(tl.int64)
    factor = tl.load(factor_ptr + rows, mask=counted, other=0.0)
    target_factor = tl.load(target_factor_ptr + rows, mask=counted, other=0.0)
    w_ptrs = head_ptr + target[:, None] * stride_head_v + steps * stride_head_d
    w = tl.load(w_ptrs, mask=mask & (target >= 0)[:, None], other=0.0).to(tl.float32)
    dh_ptrs = dh_ptr + rows[:, None] * D + steps
    dh = sum_of_parts(dh_ptrs, tl.cast(N, tl.int64) * D, mask & counted[:, None], SPLITS)
    tl.store(dh_ptrs, dh * factor[:, None] + target_factor[:, None] * w, mask=mask)


@triton.jit
def _column_sum_kernel(
    exp_ptr,  # [rows, columns]
    weights,  # RowWeights
    db_ptr,  # [V] float32
    scale_ptr,  # [1]
    count_ptr,  # [1] int32
    first_row,
    first_v,
    C,
    rows,
    columns,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """db (+)= scale · Σ w G over the rows."""
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    first_c = tl.program_id(0) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first_n in range(0, n, BLOCK_N):
        offs_n = first_n + tl.arange(0, BLOCK_N)
        exp_ptrs = exp_ptr + offs_n.to(tl.int64)[:, None] * columns + offs_c[None, :]
        mask = (offs_n < n)[:, None] & mask_c[None, :]
        e = tl.load(exp_ptrs, mask=mask, other=0.0)
        total += dlogits(e, weights, first_n, first_v + first_c, n).to(tl.float32)
    db = tl.sum(total, 0) * tl.load(scale_ptr)
    if ACCUMULATE:
        db += tl.load(db_ptr + first_v + offs_c, mask=mask_c, other=0.0)
    tl.store(db_ptr + first_v + offs_c, db, mask=mask_c)


@triton.jit
def _scale_rows_kernel(
    rows_ptr,  # [N, D] float32, contiguous
    factor_ptr,  # [N] float32
    weight_ptr,  # [N] float32, or None: 1
    out_ptr,  # [N, D], contiguous
    N,
    D,
    stride_factor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = factor · weight · rows, rounded once; a factor of 0 gives 0 whatever the row holds."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = rows < N
    places = rows[:, None] * D + offs_d[None, :]
    factor = tl.load(factor_ptr + rows * stride_factor, mask=mask_n, other=0.0)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + rows, mask=mask_n, other=0.0)
    factor = factor[:, None]
    mask = (mask_n[:, None] & (offs_d < D)[None, :]) & (factor != 0.0)
    scaled = tl.load(rows_ptr + places, mask=mask, other=0.0) * factor
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + places, scaled.to(out_ptr.dtype.element_ty), mask=mask)
