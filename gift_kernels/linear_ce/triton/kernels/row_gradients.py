"""Row kernels of the gradients: scaling of dH, dlogits of a chunk, db.

Letters: N rows of the caller, D hidden, `rows` and `columns` of a chunk's buffer E, C of these
columns in use. The weighted gradient of a logit is factor · E, and target_factor at the target: a
factor of the row that enters dW through E, or through the hidden states.
"""

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16

correct_bfloat16()


@triton.jit
def _finish_dh_kernel(
    dh_ptr,  # [N, D]
    head_ptr,  # [V, D]
    place_ptr,  # [N] int32
    local_target_ptr,  # [N] int32, compact
    factor_ptr,  # [N]
    target_factor_ptr,  # [N]
    N,
    D,
    stride_head_v,
    stride_head_d,
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
    dh = tl.load(dh_ptrs, mask=mask & counted[:, None], other=0.0)
    tl.store(dh_ptrs, dh * factor[:, None] + target_factor[:, None] * w, mask=mask)


@triton.jit
def _weigh_kernel(
    exp_ptr,  # [rows, columns]: 0 at the target
    local_target_ptr,  # [rows] int32
    factor_ptr,  # [rows]
    target_entry_ptr,  # [rows]
    count_ptr,  # [1] int32
    first_row,
    first_v,
    C,
    rows,
    columns,
    pad,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turns E into dlogits in place: scales rows whose factor is not 1, writes targets' entries."""
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    factor = tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0)
    target = tl.load(local_target_ptr + offs_n, mask=mask_n, other=-1) - first_v
    row_ptrs = exp_ptr + offs_n.to(tl.int64) * columns
    # The last tile is filled up with zeros, as in `_gather_kernel`: 0 times NaN is NaN.
    changed = (factor != 1.0) & (offs_n < tl.cdiv(tl.maximum(n, 1), pad) * pad)
    if tl.max(changed.to(tl.int32), 0) > 0:
        for first_c in range(0, C, BLOCK_C):
            offs_c = first_c + tl.arange(0, BLOCK_C)[None, :]
            mask = changed[:, None] & (offs_c < C) & (offs_c != target[:, None])
            e = tl.load(row_ptrs[:, None] + offs_c, mask=mask, other=0.0).to(tl.float32)
            # A factor of 0 gives 0 even where E is NaN.
            e = tl.where((factor == 0.0)[:, None], 0.0, e * factor[:, None])
            tl.store(row_ptrs[:, None] + offs_c, e.to(exp_ptr.dtype.element_ty), mask=mask)
    # A factor also underflows to 0 where a chunk's logits are far below the others; the target's
    # entry does not depend on it.
    entry = tl.load(target_entry_ptr + offs_n, mask=mask_n, other=0.0)
    here = mask_n & (target >= 0) & (target < C)
    tl.store(row_ptrs + target, entry.to(exp_ptr.dtype.element_ty), mask=here)


@triton.jit
def _column_sum_kernel(
    exp_ptr,  # [rows, columns]
    factor_ptr,  # [rows], or None: 1
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
    """db (+)= scale · Σ factor · E over the rows."""
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first_n in range(0, n, BLOCK_N):
        offs_n = first_n + tl.arange(0, BLOCK_N)
        exp_ptrs = exp_ptr + offs_n.to(tl.int64)[:, None] * columns + offs_c[None, :]
        mask = (offs_n < n)[:, None] & mask_c[None, :]
        e = tl.load(exp_ptrs, mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            e *= tl.load(factor_ptr + offs_n, mask=offs_n < n, other=0.0)[:, None]
        total += e
    db = tl.sum(total, 0) * tl.load(scale_ptr)
    if ACCUMULATE:
        db += tl.load(db_ptr + first_v + offs_c, mask=mask_c, other=0.0)
    tl.store(db_ptr + first_v + offs_c, db, mask=mask_c)


@triton.jit
def _scale_rows_kernel(
    rows_ptr,  # [N, D] contiguous
    factor_ptr,  # [N] float32
    out_ptr,  # [N, D], contiguous
    N,
    D,
    stride_factor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = factor · rows, rounded once; a factor of 0 gives 0 whatever the row holds."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = rows < N
    places = rows[:, None] * D + offs_d[None, :]
    factor = tl.load(factor_ptr + rows * stride_factor, mask=mask_n, other=0.0)[:, None]
    mask = (mask_n[:, None] & (offs_d < D)[None, :]) & (factor != 0.0)
    scaled = tl.load(rows_ptr + places, mask=mask, other=0.0).to(tl.float32) * factor
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + places, scaled.to(out_ptr.dtype.element_ty), mask=mask)
