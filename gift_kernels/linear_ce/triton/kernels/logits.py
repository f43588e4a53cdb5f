"""Tiles of hidden @ head.T, reduced on chip to sums of exponentials: no logits are stored.

Letters: n valid tokens, D hidden, V vocabulary, C columns of a call, `rows` and `slices` of its
buffers. For a tile of float32 accumulators a, the bias added:

    x = cap · tanh(inner · a)   with a soft-cap, else   x = a
    m = max x     e = 2^(bits · (x − m))     s = Σ e     s2 = Σ e · bits · (x − m)

The logit of the softmax is z = bits · ln 2 · x. Only differences are multiplied by `bits`, so that
an offset shared by all logits costs no precision. A logit costs a maximum, a subtraction, a
multiplication, an exponential and a sum.

m, s and s2 exclude the target's column: its x is stored separately, from the same accumulator. So
−log p = log(1 + s · 2^(bits · (m − x_target))) keeps its relative accuracy when p → 1. Most slices
hold no target and no column beyond C, so both cases are handled in branches.

With EXPONENTIALS the tile E = 2^(bits · (x − ref)) · (1 − tanh²) is stored too, rounded once to the
dtype of the head: dlogits up to a factor of the row. bfloat16 reaches from 2^−126 to 2^128,
therefore `ref` is guessed once and replaced by m only where a row exceeds it 2^MARGIN-fold;
`_merge_kernel` rescales the slices of such a row to one reference. FINAL: the references are known
from an earlier pass; only E is computed.

Programs are persistent; GROUP_M row tiles in turn use one tile of the head, which all but the first
read from L2. No atomics, no locks: each output element has one writer.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16

correct_bfloat16()

# Replaces −inf in subtractions: a difference of two infinities would be NaN.
NO_REFERENCE = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)


class Flags(NamedTuple):
    """Variants of a launch; each combination is compiled separately."""

    HAS_BIAS: bool
    HAS_CAP: bool
    ENTROPY: bool
    EXPONENTIALS: bool
    FINAL: bool
    MARGIN: float
    TMA: bool
    DTYPE: tl.dtype


class Pointers(NamedTuple):
    """Tensors that the epilogue of a tile reads and writes, all by pointer."""

    bias: Any  # [V]
    target: Any  # [rows] int32 rows of this head, −1: none
    ref: Any  # [rows]
    target_logit: Any  # [rows]
    partial: Any  # [2 or 3, slices, rows]: m, s, s2


class Sizes(NamedTuple):
    """Sizes and strides that Triton may specialise."""

    D: int
    stride_head_v: int
    stride_head_d: int
    rows: int


class Factors(NamedTuple):
    """Factors of the logits, as in the formulas above."""

    inner: float
    cap: float
    bits: float


class Side(NamedTuple):
    """One head's arguments in a launch, the model's or the guide's, except its matrices."""

    ptr: Any  # Pointers
    first_v: Any
    C: Any
    slices: Any
    size: Any  # Sizes
    factor: Any  # Factors


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, GROUP_M rows of tiles at a time."""
    width = GROUP_M * tiles_n
    first_m = (tile // width) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % width) % group_m, (tile % width) // group_m


@triton.jit
def _copied_product(hidden, head, first_n, first_v, D, TILES: tl.constexpr):
    """hidden [BLOCK_N, D] @ head[first_v : first_v + BLOCK_V].T by TMA, float32."""
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    BLOCK_V: tl.constexpr = TILES.BLOCK_V
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for first_d in range(0, D, BLOCK_D):
        h = hidden.load([first_n, first_d])
        w = head.load([first_v, first_d])
        acc = tl.dot(h, w.T, acc)
    return acc


@triton.jit
def _loaded_product(hidden, head, side, first_n, first_c, TILES: tl.constexpr):
    """The same by pointer loads, for columns first_c on of the call."""
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    BLOCK_V: tl.constexpr = TILES.BLOCK_V
    BLOCK_D: tl.constexpr = TILES.BLOCK_D
    # Read before the loop: inside it Triton 3.6 loses the constant ones.
    D, stride_v, stride_d = side.size.D, side.size.stride_head_v, side.size.stride_head_d
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_v = side.first_v + first_c + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    h_ptrs = hidden + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    w_ptrs = head + offs_v.to(tl.int64)[None, :] * stride_v
    w_ptrs += offs_d.to(tl.int64)[:, None] * stride_d
    mask_v = (offs_v < side.first_v + side.C)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for first_d in range(0, D, BLOCK_D):
        mask_d = offs_d < D - first_d
        h = tl.load(h_ptrs, mask=mask_d[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_d[:, None] & mask_v, other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        h_ptrs += BLOCK_D
        w_ptrs += tl.cast(BLOCK_D, tl.int64) * stride_d
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

    Columns are split into groups of eight and positions in a group: a thread's groups are known at
    compile time, so comparisons need no register for the column.
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
def _finish_tile(a, exp, side, n, first_n, first_c, PARTS: tl.constexpr, FLAGS: tl.constexpr):
    """Partial sums, target logit and exponentials of products a, columns first_c on of the call."""
    WIDTH: tl.constexpr = a.shape[1]
    PART: tl.constexpr = WIDTH // PARTS
    HAS_CAP: tl.constexpr = FLAGS.HAS_CAP
    DTYPE: tl.constexpr = FLAGS.DTYPE
    ptr = side.ptr
    first_v, C, slices = side.first_v, side.C, side.slices
    rows, bits, cap = side.size.rows, side.factor.bits, side.factor.cap
    offs_n = first_n + tl.arange(0, a.shape[0])
    offs_c = first_c + tl.arange(0, WIDTH)
    mask_n = offs_n < n
    if FLAGS.HAS_BIAS:
        bias = tl.load(ptr.bias + first_v + offs_c, mask=offs_c < C, other=0.0)
        a += bias.to(tl.float32)[None, :]
    x = soft_capped(a, side.factor.inner, cap, HAS_CAP)
    if C - first_c < WIDTH:
        x = tl.where(_is_below(C - first_c, WIDTH), x, float("-inf"))
    target = tl.load(ptr.target + offs_n, mask=mask_n, other=-1) - first_v - first_c
    here = (target >= 0) & (target < WIDTH)
    if tl.max(here.to(tl.int32), 0) > 0:
        if not FLAGS.FINAL:
            x_target = tl.sum(tl.where(_is_column(target, WIDTH), x, 0.0), 1)
            tl.store(ptr.target_logit + offs_n, x_target, mask=here)
        # Loaded again to save registers: otherwise the comparisons above stay live until here.
        target = tl.load(ptr.target + offs_n, mask=mask_n, other=-1) - first_v - first_c
        x = tl.where(_is_column(target, WIDTH), float("-inf"), x)
    partial_ptrs = ptr.partial + first_c // WIDTH * rows + offs_n
    if FLAGS.FINAL:
        origin = tl.load(ptr.ref + offs_n, mask=mask_n, other=0.0)
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
        if not FLAGS.FINAL:
            s += tl.sum(e, 1)
        if FLAGS.ENTROPY:
            s2 += tl.sum(tl.where(e > 0, e * t, 0.0), 1)
        if FLAGS.EXPONENTIALS:
            if not FLAGS.FINAL:
                # Loaded again from L1 for every part, to save registers.
                above = (origin - tl.load(ptr.ref + offs_n, mask=mask_n, other=0.0)) * bits
                e *= tl.exp2(tl.where(above > FLAGS.MARGIN, 0.0, above))[:, None]
            if HAS_CAP:
                # Recomputed from x to save registers. The bound is for x = −inf, where e is 0.
                tanh = tl.maximum(x, -cap) * (1.0 / cap)
                e *= 1.0 - tanh * tanh
            e = e.to(DTYPE)
            if FLAGS.TMA:
                exp.store([first_n, first_c + number * PART], e)
            else:
                exp_ptrs = exp + offs_n.to(tl.int64)[:, None] * (slices * WIDTH)
                offs_part = first_c + number * PART + tl.arange(0, PART)
                tl.store(exp_ptrs + offs_part[None, :], e)
    if not FLAGS.FINAL:
        tl.store(partial_ptrs + slices * rows, s, mask=mask_n)
    if FLAGS.ENTROPY:
        tl.store(partial_ptrs + 2 * slices * rows, s2, mask=mask_n)


@triton.jit
def _whole_tile(hidden, head, exp, tile, side, n, TILES: tl.constexpr, FLAGS: tl.constexpr):
    """One tile of a head's product, its sums and its exponentials."""
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    BLOCK_V: tl.constexpr = TILES.BLOCK_V
    GROUP_M: tl.constexpr = TILES.GROUP_M
    pid_n, pid_v = tile_of(tile, tl.cdiv(n, BLOCK_N), tl.cdiv(side.C, BLOCK_V), GROUP_M)
    first_n, first_c = pid_n * BLOCK_N, pid_v * BLOCK_V
    if FLAGS.TMA:
        first_v = side.first_v + first_c
        a = _copied_product(hidden, head, first_n, first_v, side.size.D, TILES)
    else:
        a = _loaded_product(hidden, head, side, first_n, first_c, TILES)
    _finish_tile(a, exp, side, n, first_n, first_c, TILES.PARTS, FLAGS)


@triton.jit(do_not_specialize=["first_row", "first_v", "C", "slices"])
def _logits_kernel(
    hidden,  # [rows, D] contiguous, valid rows first; or its descriptor
    head,  # [V, D], or its descriptor
    exp,  # [rows, slices * BLOCK_V], or its descriptor
    ptr,  # Pointers
    count_ptr,  # [1] int32, valid rows of the call
    first_row,
    first_v,
    C,
    slices,
    size,  # Sizes
    factor,  # Factors
    TILES: tl.constexpr,
    FLAGS: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    BLOCK_V: tl.constexpr = TILES.BLOCK_V
    FLATTEN: tl.constexpr = TILES.FLATTEN
    n = tl.minimum(tl.load(count_ptr) - first_row, size.rows)
    tiles = tl.cdiv(n, BLOCK_N) * tl.cdiv(C, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        side = Side(ptr, first_v, C, slices, size, factor)
        _whole_tile(hidden, head, exp, tile, side, n, TILES, FLAGS)


@triton.jit(do_not_specialize=["first_row", "first_v", "C", "slices", "guide_C"])
def _two_heads_kernel(
    hidden,
    head,
    exp,
    ptr,
    guide_hidden,  # [rows, guide's D], rows as those of the first head
    guide_head,
    guide_ptr,
    count_ptr,
    first_row,
    first_v,
    C,
    slices,
    guide_C,
    size,
    factor,
    guide_size,
    guide_factor,
    TILES: tl.constexpr,
    FLAGS: tl.constexpr,
    GUIDE_FLAGS: tl.constexpr,
):
    """`_logits_kernel`, after the statistics of a guide over all of its columns.

    One queue of tiles for both: SMs without a tile of the guide start on the model's. Where TMA
    reads both heads, the tile's number selects the descriptors of one product.
    """
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    BLOCK_V: tl.constexpr = TILES.BLOCK_V
    n = tl.minimum(tl.load(count_ptr) - first_row, size.rows)
    tiles_n = tl.cdiv(n, BLOCK_N)
    guide_slices = tl.cdiv(guide_C, BLOCK_V)
    guide_tiles = tiles_n * guide_slices
    tiles = guide_tiles + tiles_n * tl.cdiv(C, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        of_guide = tile < guide_tiles
        side = Side(ptr, first_v, C, slices, size, factor)
        guide = Side(guide_ptr, 0, guide_C, guide_slices, guide_size, guide_factor)
        if FLAGS.TMA and GUIDE_FLAGS.TMA:
            number, tiles_v = tile - guide_tiles, tl.cdiv(C, BLOCK_V)
            h, w, D, base = hidden, head, size.D, first_v
            if of_guide:
                number, tiles_v = tile, guide_slices
                h, w, D, base = guide_hidden, guide_head, guide_size.D, 0
            pid_n, pid_v = tile_of(number, tiles_n, tiles_v, TILES.GROUP_M)
            first_n, first_c = pid_n * BLOCK_N, pid_v * BLOCK_V
            a = _copied_product(h, w, first_n, base + first_c, D, TILES)
            if of_guide:
                _finish_tile(a, None, guide, n, first_n, first_c, TILES.PARTS, GUIDE_FLAGS)
            else:
                _finish_tile(a, exp, side, n, first_n, first_c, TILES.PARTS, FLAGS)
        elif of_guide:
            _whole_tile(guide_hidden, guide_head, None, tile, guide, n, TILES, GUIDE_FLAGS)
        else:
            _whole_tile(hidden, head, exp, tile - guide_tiles, side, n, TILES, FLAGS)
