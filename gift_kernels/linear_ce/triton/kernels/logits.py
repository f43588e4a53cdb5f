"""Tiles of hidden @ head.T that end as partial sums of exponentials: no logit leaves the chip.

Letters: n valid tokens, D hidden, V vocabulary, C columns of a call, `rows` and `slices` of its
buffers. For a tile of float32 accumulators a, the bias added:

    x = cap · tanh(inner · a)   with a soft-cap, else   x = a
    m = max x     e = 2^(bits · (x − m))     s = Σ e     s2 = Σ e · bits · (x − m)

The logit of the softmax is z = bits · ln 2 · x. Only differences are multiplied by `bits`, so that
an offset that all logits share costs no precision, however large. A logit costs a maximum, a
subtraction, a multiplication, an exponential and a sum.

The target's column takes no part in m, s and s2: its x is stored by itself, from the same
accumulator. So −log p = log(1 + s · 2^(bits · (m − x_target))) keeps its relative accuracy when
p → 1. Most slices hold no target and no column beyond C: what is done for these stands in a branch.

With EXPONENTIALS the tile E = 2^(bits · (x − ref)) · (1 − tanh²) is stored too, rounded once to the
dtype of the head: dlogits up to a factor of the row. bfloat16 reaches from 2^−126 to 2^128,
therefore `ref` is guessed once and replaced by m only where a row exceeds it 2^MARGIN-fold;
`_merge_kernel` brings the slices of such a row to one reference. FINAL: an earlier pass has done
all that, only E is wanted.

Programs are persistent; tiles of GROUP_M row tiles run one after another, so that the tile of the
head comes from L2 for all but the first. No atomics, no locks: each number has one writer.
"""

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16

correct_bfloat16()

# Stands for −inf where it is subtracted: a difference of two infinities would be NaN.
NO_REFERENCE = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
# Triton compiles another kernel for an integer that is 1 or a multiple of 16. Those that the last
# chunk of a call decides on make no difference worth it, and a loop of 1 step other tiles' memory.
PLACES = ["first_row", "first_v", "C", "slices"]


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, GROUP_M rows of tiles at a time."""
    width = GROUP_M * tiles_n
    first_m = (tile // width) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % width) % group_m, (tile % width) // group_m


@triton.jit
def _logit_tile(
    hidden,
    head,
    first_n,
    first_v,
    limit_v,
    D,
    stride_head_v,
    stride_head_d,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """hidden [BLOCK_N, D] @ head[first_v : first_v + BLOCK_V].T, float32."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if TMA:
        for first_d in range(0, D, BLOCK_D):
            h = hidden.load([first_n, first_d])
            w = head.load([first_v, first_d])
            acc = tl.dot(h, w.T, acc)
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        offs_v = first_v + tl.arange(0, BLOCK_V)
        offs_d = tl.arange(0, BLOCK_D)
        h_ptrs = hidden + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
        w_ptrs = head + offs_v.to(tl.int64)[None, :] * stride_head_v
        w_ptrs += offs_d.to(tl.int64)[:, None] * stride_head_d
        mask_v = (offs_v < limit_v)[None, :]
        for first_d in range(0, D, BLOCK_D):
            mask_d = offs_d < D - first_d
            h = tl.load(h_ptrs, mask=mask_d[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_d[:, None] & mask_v, other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")
            h_ptrs += BLOCK_D
            w_ptrs += tl.cast(BLOCK_D, tl.int64) * stride_head_d
    return acc


@triton.jit
def soft_capped(a, inner, cap, HAS_CAP: tl.constexpr):
    """cap · tanh(inner · a), or a. The error is below 2⁻²² of `cap`."""
    if HAS_CAP:
        # 1 − tanh u = 2 / (1 + e²ᵘ), right for any sign and for e²ᵘ = ∞.
        growth = tl.exp2((2.8853900817779268 * inner) * a)
        return cap - (2.0 * cap) / (1.0 + growth)
    return a


@triton.jit
def _is_column(c, WIDTH: tl.constexpr):
    """Whether a column of a tile is column c [N] of it: bool [N, WIDTH].

    Columns are eights and rests: a thread's eights are known to the compiler, so that a comparison
    needs no register for its column.
    """
    rest = tl.arange(0, 8)[None, :]
    eight = tl.where((c[:, None] >= 0) & (c[:, None] % 8 == rest), c[:, None] // 8, -1)
    is_column = eight[:, None, :] == tl.arange(0, WIDTH // 8)[None, :, None]
    return tl.reshape(is_column, (c.shape[0], WIDTH))


@triton.jit
def _is_below(c, WIDTH: tl.constexpr):
    """Whether a column of a tile is below column c > 0 of it: bool [1, WIDTH]."""
    eights = (c + 7 - tl.arange(0, 8)) // 8
    is_below = tl.arange(0, WIDTH // 8)[None, :, None] < eights[None, None, :]
    return tl.reshape(is_below, (1, WIDTH))


@triton.jit
def _finish_tile(
    a,
    bias_ptr,
    target_ptr,
    ref_ptr,
    target_logit_ptr,
    partial_ptr,
    exp,
    n,
    first_n,
    first_c,
    first_v,
    C,
    inner,
    cap,
    bits,
    rows,
    slices,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
    FINAL: tl.constexpr,
    MARGIN: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Partial sums, target logit and exponentials of products a, columns first_c on of the call."""
    WIDTH: tl.constexpr = a.shape[1]
    PART: tl.constexpr = WIDTH // PARTS
    offs_n = first_n + tl.arange(0, a.shape[0])
    offs_c = first_c + tl.arange(0, WIDTH)
    mask_n = offs_n < n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_v + offs_c, mask=offs_c < C, other=0.0)
        a += bias.to(tl.float32)[None, :]
    x = soft_capped(a, inner, cap, HAS_CAP)
    if C - first_c < WIDTH:
        x = tl.where(_is_below(C - first_c, WIDTH), x, float("-inf"))
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1) - first_v - first_c
    here = (target >= 0) & (target < WIDTH)
    if tl.max(here.to(tl.int32), 0) > 0:
        if not FINAL:
            x_target = tl.sum(tl.where(_is_column(target, WIDTH), x, 0.0), 1)
            tl.store(target_logit_ptr + offs_n, x_target, mask=here)
        # Read again: comparisons made once for both uses would be kept, bit by bit, in registers.
        target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1) - first_v - first_c
        x = tl.where(_is_column(target, WIDTH), float("-inf"), x)
    partial_ptrs = partial_ptr + first_c // WIDTH * rows + offs_n
    if FINAL:
        origin = tl.load(ref_ptr + offs_n, mask=mask_n, other=0.0)
    else:
        m = tl.max(x, 1)
        tl.store(partial_ptrs, m, mask=mask_n)
        origin = tl.maximum(m, NO_REFERENCE)
    halves = tl.reshape(x, (x.shape[0], PARTS, PART)).permute(0, 2, 1)
    parts = (x,) if PARTS == 1 else halves.split()
    s = tl.zeros((a.shape[0],), tl.float32)
    s2 = tl.zeros((a.shape[0],), tl.float32)
    for number in tl.static_range(PARTS):
        x = parts[number]
        t = (x - origin[:, None]) * bits
        e = tl.exp2(t)
        if not FINAL:
            s += tl.sum(e, 1)
        if ENTROPY:
            s2 += tl.sum(tl.where(e > 0, e * t, 0.0), 1)
        if EXPONENTIALS:
            if not FINAL:
                # From L1 once a part: registers.
                above = (origin - tl.load(ref_ptr + offs_n, mask=mask_n, other=0.0)) * bits
                e *= tl.exp2(tl.where(above > MARGIN, 0.0, above))[:, None]
            if HAS_CAP:
                # Rather from x again than kept: registers. The bound is for −inf, where e is 0.
                tanh = tl.maximum(x, -cap) * (1.0 / cap)
                e *= 1.0 - tanh * tanh
            e = e.to(DTYPE)
            if TMA:
                exp.store([first_n, first_c + number * PART], e)
            else:
                exp_ptrs = exp + offs_n.to(tl.int64)[:, None] * (slices * WIDTH)
                offs_part = first_c + number * PART + tl.arange(0, PART)
                tl.store(exp_ptrs + offs_part[None, :], e)
    if not FINAL:
        tl.store(partial_ptrs + slices * rows, s, mask=mask_n)
    if ENTROPY:
        tl.store(partial_ptrs + 2 * slices * rows, s2, mask=mask_n)


@triton.jit
def _whole_tile(
    tile,
    hidden,
    head,
    bias_ptr,
    target_ptr,
    ref_ptr,
    target_logit_ptr,
    partial_ptr,
    exp,
    n,
    first_v,
    C,
    D,
    stride_head_v,
    stride_head_d,
    inner,
    cap,
    bits,
    rows,
    slices,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
    FINAL: tl.constexpr,
    MARGIN: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One tile of a head's product, and all that comes of it."""
    pid_n, pid_v = tile_of(tile, tl.cdiv(n, BLOCK_N), tl.cdiv(C, BLOCK_V), GROUP_M)
    first_c = pid_v * BLOCK_V
    a = _logit_tile(
        hidden, head, pid_n * BLOCK_N, first_v + first_c, first_v + C, D,
        stride_head_v, stride_head_d, BLOCK_N, BLOCK_V, BLOCK_D, TMA,
    )  # fmt: skip
    _finish_tile(
        a, bias_ptr, target_ptr, ref_ptr, target_logit_ptr, partial_ptr, exp, n, pid_n * BLOCK_N,
        first_c, first_v, C, inner, cap, bits, rows, slices, PARTS, HAS_BIAS, HAS_CAP, ENTROPY,
        EXPONENTIALS, FINAL, MARGIN, TMA, DTYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=PLACES)
def _logits_kernel(
    hidden,  # [rows, D] contiguous, rows that count first; or its descriptor
    head,  # [V, D], or its descriptor
    bias_ptr,  # [V]
    target_ptr,  # [rows] int32 rows of this head, −1: none
    ref_ptr,  # [rows]
    target_logit_ptr,  # [rows]
    partial_ptr,  # [2 or 3, slices, rows]: m, s, s2
    exp,  # [rows, slices * width of a slice], or its descriptor
    count_ptr,  # [1] int32, rows that count
    first_row,
    first_v,
    C,
    D,
    stride_head_v,
    stride_head_d,
    inner,
    cap,
    bits,
    rows,
    slices,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
    FINAL: tl.constexpr,
    MARGIN: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    tiles = tl.cdiv(n, BLOCK_N) * tl.cdiv(C, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        _whole_tile(
            tile, hidden, head, bias_ptr, target_ptr, ref_ptr, target_logit_ptr, partial_ptr, exp,
            n, first_v, C, D, stride_head_v, stride_head_d, inner, cap, bits, rows, slices,
            BLOCK_N, BLOCK_V, BLOCK_D, GROUP_M, PARTS, HAS_BIAS, HAS_CAP, ENTROPY, EXPONENTIALS,
            FINAL, MARGIN, TMA, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*PLACES, "guide_C", "guide_slices"])
def _two_heads_kernel(
    hidden,
    head,
    bias_ptr,
    target_ptr,
    ref_ptr,
    target_logit_ptr,
    partial_ptr,
    exp,
    guide_hidden,  # [rows, guide's D], as of the first head
    guide_head,
    guide_bias_ptr,
    guide_target_ptr,
    guide_ref_ptr,
    guide_target_logit_ptr,
    guide_partial_ptr,
    count_ptr,
    first_row,
    first_v,
    C,
    D,
    stride_head_v,
    stride_head_d,
    inner,
    cap,
    bits,
    rows,
    slices,
    guide_C,
    guide_D,
    stride_guide_head_v,
    stride_guide_head_d,
    guide_inner,
    guide_cap,
    guide_bits,
    guide_slices,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
    FINAL: tl.constexpr,
    MARGIN: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    GUIDE_HAS_BIAS: tl.constexpr,
    GUIDE_HAS_CAP: tl.constexpr,
    GUIDE_TMA: tl.constexpr,
):
    """As `_logits_kernel`, and before it the statistics of a guide over all of its columns.

    One queue of tiles for both: the SMs that run out of the guide's go on with the model's.
    """
    tl.static_assert(not FLATTEN, "two inner loops make no single pipeline")
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    tiles_n = tl.cdiv(n, BLOCK_N)
    guide_tiles = tiles_n * tl.cdiv(guide_C, BLOCK_V)
    tiles = guide_tiles + tiles_n * tl.cdiv(C, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < guide_tiles:
            _whole_tile(
                tile, guide_hidden, guide_head, guide_bias_ptr, guide_target_ptr, guide_ref_ptr,
                guide_target_logit_ptr, guide_partial_ptr, None, n, 0, guide_C, guide_D,
                stride_guide_head_v, stride_guide_head_d, guide_inner, guide_cap, guide_bits, rows,
                guide_slices, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_M, PARTS, GUIDE_HAS_BIAS,
                GUIDE_HAS_CAP, False, False, False, 0.0, GUIDE_TMA, DTYPE,
            )  # fmt: skip
        else:
            _whole_tile(
                tile - guide_tiles, hidden, head, bias_ptr, target_ptr, ref_ptr, target_logit_ptr,
                partial_ptr, exp, n, first_v, C, D, stride_head_v, stride_head_d, inner, cap, bits,
                rows, slices, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_M, PARTS, HAS_BIAS, HAS_CAP,
                ENTROPY, EXPONENTIALS, FINAL, MARGIN, TMA, DTYPE,
            )  # fmt: skip
