"""Row-wise kernels: the list of valid tokens, their running sums, their statistics.

Letters: N rows of the caller, n valid tokens (on the device only), D hidden, `rows` of a buffer,
C columns and T slices of columns of a chunk. x are accumulators, z = nats · x logits and
bits = nats / ln 2 (see `logits`). State of a row, over all columns so far except the target's:

    ref of E     M = max x     S = Σ 2^(bits (x − M))     S2 = Σ 2^(bits (x − M)) · bits (x − M)

With x_y the target's x and u = S e^(nats (M − x_y)), all with relative accuracy as p → 1 and for
any common offset of x:

    nll = log(1 + u)     p = 1 / (1 + u)     1 − p = u / (1 + u)

The share (1 − p) / (S 2^(bits (M − ref))) turns exponentials 2^(bits (x − ref)) into probabilities.
It is not computed from the log-sum-exp, whose rounding error grows with the logits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gift_kernels.interpreter import correct_bfloat16
from gift_kernels.linear_ce.triton.kernels.logits import NO_REFERENCE, soft_capped
from gift_kernels.linear_ce.triton.kernels.matmul import sum_of_parts

correct_bfloat16()


class Transform(NamedTuple):
    """A `WeightTransform` as kernel arguments."""

    power: float
    floor: float
    threshold: float


@triton.jit
def _transformed(w, transform, HAS_POWER: tl.constexpr):
    """max(w, floor) ** power, and 0 where w < threshold; NaN stays NaN."""
    is_low = w < transform.threshold
    base = tl.where((w <= transform.floor) | is_low, transform.floor, w)
    if HAS_POWER:
        # In float64: the logarithm's rounding error would be multiplied by its size.
        powered = tl.exp2(tl.log2(base.to(tl.float64)) * transform.power).to(tl.float32)
        base = tl.where(transform.power == 0.0, 1.0, powered)
    return tl.where(is_low, 0.0, base)


@triton.jit
def _compact_kernel(
    target_ptr,  # [N] int64
    given_ptr,  # [N] weights of any floating-point dtype, or None: 1
    index_ptr,  # [N] int32: rows of valid tokens, in order; 0 past their number
    place_ptr,  # [N] int32: where a row is in index, or −1
    count_ptr,  # [1] int32
    weight_ptr,  # [N]: given weights transformed, 0 on ignored rows
    row_count_ptr,  # []: rows that are not ignored, at least 1
    N,
    ignore_index,
    transform,  # Transform
    HAS_POWER: tl.constexpr,
    KEEP_ZERO_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of weight 0 are left out, unless KEEP_ZERO_ROWS.

    One program, so that the prefix sum and n need one launch.
    """
    count = 0
    targets = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, N, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < N
        is_target = mask & (tl.load(target_ptr + offs, mask=mask, other=0) != ignore_index)
        targets += is_target.to(tl.int32)
        w = tl.full((BLOCK,), 1.0, tl.float32)
        if given_ptr is not None:
            w = tl.load(given_ptr + offs, mask=is_target, other=0.0).to(tl.float32)
        w = tl.where(is_target, _transformed(w, transform, HAS_POWER), 0.0)
        tl.store(weight_ptr + offs, w, mask=mask)
        # NaN weights are kept, so that the loss becomes NaN.
        valid = is_target if KEEP_ZERO_ROWS else is_target & (w != 0.0)
        ones = valid.to(tl.int32)
        place = count + tl.cumsum(ones, 0) - ones
        tl.store(index_ptr + place, offs, mask=valid)
        tl.store(place_ptr + offs, tl.where(valid, place, -1), mask=mask)
        count += tl.sum(ones, 0)
    tl.store(count_ptr, count)
    tl.store(row_count_ptr, tl.maximum(tl.sum(targets, 0), 1).to(tl.float32))
    for first in range(0, N, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tl.store(index_ptr + offs, 0, mask=(offs >= count) & (offs < N))


class GatherSizes(NamedTuple):
    """Sizes and strides that Triton may specialise; `rows` of a chunk, whole tiles of `pad`."""

    V: int
    D: int
    rows: int
    pad: int
    stride_hidden_n: int
    stride_hidden_d: int
    stride_head_v: int
    stride_head_d: int


@triton.jit
def _gather_kernel(
    hidden_ptr,  # [N, D]
    head_ptr,  # [V, D]
    bias_ptr,  # [V], or None
    target_ptr,  # [N] int64
    index_ptr,  # [N] int32
    count_ptr,  # [1] int32
    out_ptr,  # [rows, D]
    local_target_ptr,  # [N] int32 by valid token: row of this head, or −1
    state_ptr,  # [4, N] by valid token, or None: known already
    target_logit_ptr,  # [N] by valid token, or None
    first_row,
    vocab_start,
    N,
    size,  # GatherSizes
    factor,  # Factors
    GUESS: tl.constexpr,
    BELOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies valid rows and their targets, starts their state; GUESS: with x_y as reference."""
    V, D, rows, pad = size.V, size.D, size.rows, size.pad
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # The last tile is filled up with zeros, because dW sums over all rows of a tile.
    copied = offs_n < tl.cdiv(tl.maximum(n, 1), pad) * pad
    mask_n = offs_n < n
    source = tl.load(index_ptr + first_row + offs_n, mask=mask_n, other=0).to(tl.int64)
    target = tl.load(target_ptr + source, mask=mask_n, other=-1) - vocab_start
    found = mask_n & (target >= 0) & (target < V)
    target = tl.where(found, target, 0)
    dot = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if tl.program_id(0) * BLOCK_N < tl.maximum(n, 0) + pad:
        for first_d in range(0, D, BLOCK_D):
            offs_d = first_d + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < D)[None, :]
            steps = offs_d.to(tl.int64)[None, :]
            h_ptrs = (
                hidden_ptr + source[:, None] * size.stride_hidden_n + steps * size.stride_hidden_d
            )
            h = tl.load(h_ptrs, mask=mask_n[:, None] & mask_d, other=0.0)
            out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * D + steps
            tl.store(out_ptrs, h, mask=copied[:, None] & mask_d)
            if GUESS:
                w_ptrs = (
                    head_ptr + target[:, None] * size.stride_head_v + steps * size.stride_head_d
                )
                w = tl.load(w_ptrs, mask=found[:, None] & mask_d, other=0.0)
                dot += h.to(tl.float32) * w.to(tl.float32)
    places = first_row + offs_n
    tl.store(local_target_ptr + places, tl.where(found, target, -1).to(tl.int32), mask=mask_n)
    if state_ptr is not None:
        x = tl.full((BLOCK_N,), NO_REFERENCE, tl.float32)
        if GUESS:
            a = tl.sum(dot, 1)
            if bias_ptr is not None:
                a += tl.load(bias_ptr + target, mask=found, other=0.0).to(tl.float32)
            x = soft_capped(a, factor.inner, factor.cap, HAS_CAP) - BELOW / factor.bits
            # Comparisons with NaN are false; an infinite reference would give NaN later.
            x = tl.where(found & (tl.abs(x) < -NO_REFERENCE), x, NO_REFERENCE)
        tl.store(state_ptr + places, x, mask=mask_n)
        tl.store(state_ptr + N + places, 0.0, mask=mask_n)
        tl.store(state_ptr + 2 * N + places, 0.0, mask=mask_n)
        tl.store(state_ptr + 3 * N + places, float("-inf"), mask=mask_n)
        tl.store(target_logit_ptr + places, float("nan"), mask=mask_n)


@triton.jit
def _merge_kernel(
    partial_ptr,  # [2 or 3, most_slices, rows]
    state_ptr,  # [4, N]: ref, S, S2, M
    exp_ptr,  # [rows, most_slices * WIDTH]
    dh_ptr,  # [SPLITS, N, D], or None: nothing has been added to it yet
    index_ptr,  # [N] int32
    count_ptr,  # [1] int32
    first_row,
    N,
    slices,
    most_slices,
    rows,
    D,
    bits,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
    MARGIN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds a chunk's partial sums to the state; rescales E and dH where the reference changed."""
    BLOCK_D: tl.constexpr = 256  # of dH, at a time
    n = tl.minimum(tl.load(count_ptr) - first_row, rows)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) * BLOCK_N >= n:
        return
    mask_n = offs_n < n
    state_ptrs = state_ptr + first_row + offs_n
    ref = tl.load(state_ptrs, mask=mask_n, other=0.0)
    s = tl.load(state_ptrs + N, mask=mask_n, other=0.0)
    largest = tl.load(state_ptrs + 3 * N, mask=mask_n, other=0.0)

    s2 = tl.zeros((BLOCK_N,), tl.float32)
    if ENTROPY:
        s2 = tl.load(state_ptrs + 2 * N, mask=mask_n, other=0.0)
    # A difference of two infinities would be NaN.
    origin = tl.maximum(largest, NO_REFERENCE)
    new_ref = ref
    lowest = tl.full((BLOCK_N,), float("inf"), tl.float32)
    for first_t in range(0, slices, BLOCK_T):
        offs_t = first_t + tl.arange(0, BLOCK_T)
        mask = (offs_t < slices)[:, None] & mask_n[None, :]
        partial_ptrs = partial_ptr + offs_t[:, None] * rows + offs_n[None, :]
        m_t = tl.load(partial_ptrs, mask=mask, other=float("-inf"))
        s_t = tl.load(partial_ptrs + most_slices * rows, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(m_t, 0))
        before, origin = origin, tl.maximum(largest, NO_REFERENCE)
        step = (before - origin) * bits
        step_t = (tl.maximum(m_t, NO_REFERENCE) - origin[None, :]) * bits
        power = tl.exp2(step)
        power_t = tl.exp2(step_t)
        if ENTROPY:
            s2_t = tl.load(partial_ptrs + 2 * most_slices * rows, mask=mask, other=0.0)
            s2 = power * (s2 + step * s)
            s2 += tl.sum(power_t * (s2_t + step_t * s_t), 0)
        s = s * power + tl.sum(s_t * power_t, 0)
        if EXPONENTIALS:
            ref_t = tl.where((m_t - ref[None, :]) * bits > MARGIN, m_t, ref[None, :])
            new_ref = tl.maximum(new_ref, tl.max(ref_t, 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(mask, ref_t, float("inf")), 0))
        else:
            new_ref = origin
    tl.store(state_ptrs, new_ref, mask=mask_n)
    tl.store(state_ptrs + N, s, mask=mask_n)
    tl.store(state_ptrs + 3 * N, largest, mask=mask_n)
    if ENTROPY:
        tl.store(state_ptrs + 2 * N, s2, mask=mask_n)
    if EXPONENTIALS:
        stale = tl.max((mask_n & (lowest < new_ref)).to(tl.int32), 0)
        if stale > 0:
            exp_ptrs = exp_ptr + offs_n.to(tl.int64)[:, None] * (most_slices * WIDTH)
            exp_ptrs += tl.arange(0, WIDTH)[None, :]
            for t in range(0, slices):
                m = tl.load(partial_ptr + t * rows + offs_n, mask=mask_n, other=float("-inf"))
                above = (m - ref) * bits
                power = tl.exp2((tl.where(above > MARGIN, m, ref) - new_ref) * bits)
                changed = mask_n & (power != 1.0)
                e = tl.load(exp_ptrs + t * WIDTH, mask=changed[:, None], other=0.0)
                e = (e.to(tl.float32) * power[:, None]).to(exp_ptr.dtype.element_ty)
                tl.store(exp_ptrs + t * WIDTH, e, mask=changed[:, None])
    if dh_ptr is not None:
        factor = tl.exp2((ref - new_ref) * bits)
        changed = mask_n & (factor != 1.0)
        stale = tl.max(changed.to(tl.int32), 0)
        if stale > 0:
            places = tl.load(index_ptr + first_row + offs_n, mask=mask_n, other=0).to(tl.int64)
            for part in tl.static_range(SPLITS):
                row_ptrs = dh_ptr + (part * tl.cast(N, tl.int64) + places)[:, None] * D
                for first_d in range(0, D, BLOCK_D):
                    offs_d = first_d + tl.arange(0, BLOCK_D)
                    dh_ptrs = row_ptrs + offs_d[None, :]
                    both = changed[:, None] & (offs_d < D)[None, :]
                    dh = tl.load(dh_ptrs, mask=both, other=0.0)
                    tl.store(dh_ptrs, dh * factor[:, None], mask=both)


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 ≤ u ≤ 1, to a few units in the last place: 2 atanh(u / (2 + u))."""
    t = u / (2.0 + u)
    t2 = t * t
    series = 1.0 / 15
    for k in tl.static_range(6, -1, -1):
        series = series * t2 + 1.0 / (2 * k + 1)
    return 2.0 * t * series


@triton.jit
def _exp(x):
    """e^x to a few units in the last place; `tl.exp` loses |x| of them."""
    x = tl.where(x < -150.0, -150.0, tl.where(x > 150.0, 150.0, x))
    log2_e = 1.4426950408889634
    k = tl.floor(x * log2_e + 0.5)
    # ln 2 in two parts; a whole number below 2^15 times the first is exact in float32.
    rest = (x - k * 0.693359375) + k * 2.1219444005469057e-4
    return tl.exp2(k) * tl.exp2(rest * log2_e)


@triton.jit
def _difference(a, b):
    """a − b as a float32 and its rounding error (0 where that is not finite)."""
    d = a - b
    back = d - a
    error = (a - (d - back)) - (b + back)
    return d, tl.where(tl.abs(error) < 1e30, error, 0.0)


class HeadSizes(NamedTuple):
    """Sizes of a head [V, D] where only some of its rows are read."""

    D: int
    stride_head_v: int
    stride_head_d: int


class FinishFactors(NamedTuple):
    """Of a head's accumulators: nats and bits as above, the logit scale, the soft-cap or 1."""

    nats: float
    bits: float
    scale: float
    cap: float


@triton.jit
def _finish_kernel(
    state_ptr,  # [4, N] by valid token: ref of this rank's E; S, S2, M of the whole vocabulary
    target_logit_ptr,  # [N] by valid token, NaN where no column is the target
    place_ptr,  # [N] int32
    weight_ptr,  # [N], written if CONFIDENCE
    found,  # RowStats: pointers [N] in the caller's order, None where not asked for
    factor_ptr,  # [4, N]: of Σ E W, of the target's row of the head; ref, its share; or None
    dh_ptr,  # [SPLITS, N, D] with the sum Σ E W, or None; the first becomes dH
    local_target_ptr,  # [N] int32 by valid token
    head_ptr,  # [V, D]
    N,
    size,  # HeadSizes
    factor,  # FinishFactors
    transform,  # Transform
    HAS_POWER: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Statistics of the caller's rows from the state; 0 on rows left out. CONFIDENCE: p is the
    weight.

    dH becomes factor · ΣE W + target_factor · W_y, the latter in float32.
    """
    # Read here: in the loop over D Triton 3.6 loses those that are constants.
    D, stride_head_v, stride_head_d = size.D, size.stride_head_v, size.stride_head_d
    nats, bits, scale, cap = factor.nats, factor.bits, factor.scale, factor.cap
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    place = tl.load(place_ptr + rows, mask=mask, other=-1)
    counted = place >= 0
    ref = tl.load(state_ptr + place, mask=counted, other=0.0)
    s = tl.load(state_ptr + N + place, mask=counted, other=0.0)
    top_x = tl.load(state_ptr + 3 * N + place, mask=counted, other=0.0)
    x = tl.load(target_logit_ptr + place, mask=counted, other=0.0)
    # A logit of +inf gives NaN, as inf − inf does in nll.
    y = tl.where(x == float("inf"), float("nan"), x)
    gap, error = _difference(top_x, y)
    gap *= nats
    u = s * _exp(gap) * (1.0 + nats * error)
    # 1 + u where the target is more probable than all others together, else 1 + 1 / u times u.
    is_likely = u < 1.0
    small = tl.where(is_likely, u, 1.0 / u)
    log_small = _log1p(small)
    log_s = tl.log(s)
    nll = tl.where(is_likely, 0.0, gap + log_s) + log_small
    p = tl.where(is_likely, 1.0, small) / (1.0 + small)
    if CONFIDENCE:
        w = tl.where(counted, _transformed(p, transform, HAS_POWER), 0.0)
        tl.store(weight_ptr + rows, w, mask=mask)
    else:
        w = tl.load(weight_ptr + rows, mask=mask, other=0.0)
    if found.loss is not None:
        tl.store(found.loss + rows, tl.where(counted & (w != 0.0), w * nll, 0.0), mask=mask)
    if found.nll is not None:
        tl.store(found.nll + rows, tl.where(counted, nll, 0.0), mask=mask)
    if found.lse is not None:
        lse = tl.where(is_likely, nats * y, nats * top_x + log_s) + log_small
        tl.store(found.lse + rows, tl.where(counted, lse, 0.0), mask=mask)
    if found.top1 is not None:
        tl.store(found.top1 + rows, counted & (x >= top_x), mask=mask)
    if found.largest is not None:
        # The target's, or that of the likeliest other token.
        likeliest = tl.where(is_likely, p, tl.maximum(p, 1.0 / (s * (1.0 + small))))
        tl.store(found.largest + rows, tl.where(counted, likeliest, 0.0), mask=mask)
    if found.entropy is not None:
        # The sum of p_v (z_max − z_v), relative to the target's logit or to M: no cancellation.
        ln_2 = 0.6931471805599453
        s2 = tl.load(state_ptr + 2 * N + place, mask=counted, other=0.0) * ln_2
        from_target = tl.where(u > 0.0, u * (s2 / s + gap), 0.0)
        at_target = tl.where(small > 0.0, s * small * gap, 0.0)
        entropy = tl.where(
            is_likely,
            log_small - from_target / (1.0 + u),
            log_s + log_small - (s2 - at_target) / (s * (1.0 + small)),
        )
        tl.store(found.entropy + rows, tl.where(counted, entropy, 0.0), mask=mask)
    slope = scale
    if HAS_CAP:
        tanh = tl.maximum(x, -cap) / cap
        slope = scale * (1.0 - tanh * tanh)
    origin = tl.where(is_likely, y, top_x)
    share = tl.exp2((ref - origin) * bits) / (tl.where(is_likely, 1.0, s) * (1.0 + small))
    target_factor = -tl.where(is_likely, u, 1.0) / (1.0 + small) * slope
    if factor_ptr is not None:
        tl.store(factor_ptr + rows, tl.where(counted, scale * share, 0.0), mask=mask)
        tl.store(factor_ptr + N + rows, tl.where(counted, target_factor, 0.0), mask=mask)
        tl.store(factor_ptr + 2 * N + rows, tl.where(counted, ref, 0.0), mask=mask)
        tl.store(factor_ptr + 3 * N + rows, tl.where(counted, share, 0.0), mask=mask)
    if dh_ptr is not None:
        target = tl.load(local_target_ptr + place, mask=counted, other=-1).to(tl.int64)
        for first_d in range(0, D, BLOCK_D):
            steps = (first_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
            in_row = steps < D
            w_ptrs = head_ptr + target[:, None] * stride_head_v + steps * stride_head_d
            w_y = tl.load(w_ptrs, mask=(target >= 0)[:, None] & in_row, other=0.0).to(tl.float32)
            dh_ptrs = dh_ptr + rows.to(tl.int64)[:, None] * D + steps
            dh = sum_of_parts(dh_ptrs, tl.cast(N, tl.int64) * D, counted[:, None] & in_row, SPLITS)
            dh = dh * (scale * share)[:, None] + target_factor[:, None] * w_y
            dh = tl.where(counted[:, None], dh, 0.0)
            tl.store(dh_ptrs, dh, mask=mask[:, None] & in_row)
