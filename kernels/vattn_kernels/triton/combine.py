"""Stage ``combine``: merge the splits, certify or set the next scales, write output, statistics and counters."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.layout import (
    DENSE,
    DONE,
    EXHAUSTED,
    MASS,
    MAXIMUM,
    MOMENT,
    NUM_SCALARS,
    SAMPLED,
    SQUARES,
    STATE_CONTEXT,
    STATE_READS,
    STATE_SCALE,
)

LN2 = tl.constexpr(0.6931471805599453)
LEAST_UNIT = tl.constexpr(1e-15)
MOST_HALF_WIDTH = tl.constexpr(1e3)
# A token whose estimated share of the output exceeds epsilon / GUARD is read for certain; SLACK is how far a predicted
# scale may stay below that, in nats.
GUARD = tl.constexpr(8.0)
SLACK = tl.constexpr(0.35)
# The next step aims AIM nats above what this one needed and comes down by at most DECAY: a study of real attention,
# kernels/benchmarks/RESULTS.md. A retry adds RETRY to what the variance asks for.
AIM = tl.constexpr(0.6)
DECAY = tl.constexpr(0.15)
RETRY = tl.constexpr(0.15)
MOST_GROWTH = tl.constexpr(3.0)
OUTPUT = tl.constexpr(0)
DENOMINATOR = tl.constexpr(1)
NUMERATOR = tl.constexpr(2)
CERTIFIED = tl.constexpr(0)
UNCERTIFIED = tl.constexpr(1)
CAPPED = tl.constexpr(2)
SERVED_DENSELY = tl.constexpr(3)


@triton.jit
def half_width(variance, spread, unit, p_table, POINTS: tl.constexpr, PER_UNIT: tl.constexpr):
    """Relative half-width ``z sqrt(V) / unit`` with the quantile at ``nu = 2 V^2 / Var(V)``; ``spread`` is Var(V) / V^2."""
    x = tl.minimum(spread * (0.5 * PER_UNIT), POINTS - 1.0)
    j = tl.minimum(x.to(tl.int32), POINTS - 2)
    low, high = tl.load(p_table + j), tl.load(p_table + j + 1)
    z = low + (x - j.to(tl.float32)) * (high - low)
    return z * tl.sqrt(tl.maximum(variance, 0.0)) / unit


@triton.jit
def observe(p_block, p_edges, value, EDGES: tl.constexpr, EDGES_P: tl.constexpr):
    """Add one value to a histogram block: its sum, then one count a bucket."""
    o_e = tl.arange(0, EDGES_P)
    edges = tl.load(p_edges + o_e, mask=o_e < EDGES, other=float("inf"))
    bucket = tl.sum((edges < value).to(tl.int32), 0)
    tl.atomic_add(p_block, value.to(tl.float64), sem="relaxed")
    tl.atomic_add(p_block + 1 + bucket, 1.0, sem="relaxed")


@triton.jit
def combine_fwd_kernel(
    p_outs, p_scalars, p_seq_lens, p_mode, p_log_scale, p_fixed, p_counts, p_reads, p_params, p_state, p_state_rows,
    p_budget_edges, p_error_edges, p_out, p_stats, p_counters,
    sink, window, cap, at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SEGMENTS: tl.constexpr, SPLITS_P: tl.constexpr, MOST: tl.constexpr, STATE: tl.constexpr, TARGET: tl.constexpr,
    LAST: tl.constexpr, EXACT_NEXT: tl.constexpr, TABLE: tl.constexpr, POINTS: tl.constexpr, PER_UNIT: tl.constexpr,
    BUDGET_EDGES: tl.constexpr, BUDGET_EDGES_P: tl.constexpr, ERROR_EDGES: tl.constexpr, ERROR_EDGES_P: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0)
    b, h = i_row // HKV, i_row % HKV
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    mode = tl.load(p_mode + i_row)
    n = tl.load(p_seq_lens + b).to(tl.int32)
    if mode == DONE:
        if n <= 0:
            for g in tl.static_range(G):
                nothing = tl.zeros([DP], p_out.dtype.element_ty)
                tl.store(p_out + (i_row * G + g) * D + o_d, nothing, mask=m_d)
                o_s = tl.arange(0, 8)
                tl.store(p_stats + (i_row * G + g) * 6 + o_s, tl.where(o_s == 3, 3.0, tl.where(o_s == 0, 1.0, 0.0)), mask=o_s < 6)
        return
    low = tl.minimum(sink, n)
    total = tl.maximum(n - window, low) - low
    fixed_tokens = n - total
    epsilon = tl.load(p_params)
    sampled = mode == SAMPLED
    o_m = tl.arange(0, MOST)
    m_m = (o_m < SEGMENTS) & sampled
    count = tl.sum(tl.load(p_counts + i_row * MOST + o_m, mask=m_m, other=0), 0)
    expected = tl.sum(tl.load(p_reads + i_row * MOST + o_m, mask=m_m, other=0.0), 0)
    whole = count == total
    read = tl.where(sampled, fixed_tokens + count, n)

    o_s = tl.arange(0, SPLITS_P)
    m_s = o_s < SEGMENTS + 1
    first = i_row * (SEGMENTS + 1)
    o_g = tl.arange(0, GP)
    widths = tl.zeros([GP], tl.float32)
    guards = tl.zeros([GP], tl.float32)
    starts = tl.zeros([GP], tl.float32)
    residuals = tl.zeros([GP], tl.float32)
    for g in tl.static_range(G):
        p_own = p_scalars + (first + o_s) * NUM_SCALARS * WIDTH + g
        maxima = tl.load(p_own + MAXIMUM * WIDTH, mask=m_s, other=float("-inf"))  # [S], in octaves
        top = tl.max(maxima, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        f = tl.exp2(maxima - top)
        f2 = f * f
        masses = f * tl.load(p_own + MASS * WIDTH, mask=m_s, other=0.0)
        mass = tl.sum(masses, 0)
        tile = p_outs + ((first + o_s).to(tl.int64)[:, None] * WIDTH + g) * DP + o_d[None, :]
        numerator = tl.sum(f[:, None] * tl.load(tile, mask=m_s[:, None], other=0.0), 0)  # [DP]
        along = tl.sum(f2[:, None] * tl.load(tile + G * DP, mask=m_s[:, None], other=0.0), 0)
        p_square = p_own + G
        plain = tl.sum(f2 * tl.load(p_square + MASS * WIDTH, mask=m_s, other=0.0), 0)
        squares = tl.sum(f2 * tl.load(p_square + SQUARES * WIDTH, mask=m_s, other=0.0), 0)
        f4 = f2 * f2
        moment0 = tl.sum(f4 * tl.load(p_square + MOMENT * WIDTH, mask=m_s, other=0.0), 0)
        moment1 = tl.sum(f4 * tl.load(p_square + (MOMENT + 1) * WIDTH, mask=m_s, other=0.0), 0)
        moment2 = tl.sum(f4 * tl.load(p_square + (MOMENT + 2) * WIDTH, mask=m_s, other=0.0), 0)
        value2 = tl.sum(f * tl.load(p_own + SQUARES * WIDTH, mask=m_s, other=0.0), 0)

        out = numerator / tl.maximum(mass, 1e-30)
        norm2 = tl.sum(out * out, 0)
        norm = tl.sqrt(norm2)
        tl.store(p_out + (i_row * G + g) * D + o_d, out.to(p_out.dtype.element_ty), mask=m_d)
        unit_output = tl.maximum(mass * norm, LEAST_UNIT)
        unit_mass = tl.maximum(mass, LEAST_UNIT)
        if TARGET == OUTPUT:
            about = squares + norm2 * plain
            spread = (moment2 + 2 * norm2 * moment1 + norm2 * norm2 * moment0) / tl.maximum(about * about, 1e-37)
            variance = squares - 2 * tl.sum(out * along, 0) + norm2 * plain
            width = half_width(variance, spread, unit_output, p_params + TABLE, POINTS, PER_UNIT)
        else:
            spread_mass = moment0 / tl.maximum(plain * plain, 1e-37)
            spread_value = moment2 / tl.maximum(squares * squares, 1e-37)
            width_mass = half_width(plain, spread_mass, unit_mass, p_params + TABLE, POINTS, PER_UNIT)
            width_value = half_width(squares, spread_value, unit_output, p_params + TABLE, POINTS, PER_UNIT)
            width = 2 * (width_mass + width_value)
            if TARGET == DENOMINATOR:
                width = width_mass
            if TARGET == NUMERATOR:
                width = width_value
        width = tl.where(sampled & (whole == 0), width, 0.0)
        width = tl.where(width < MOST_HALF_WIDTH, width, MOST_HALF_WIDTH)
        log_mass = top * LN2 + tl.log(tl.maximum(mass, 1e-30))
        size = tl.maximum(norm, 1e-20)
        if TARGET == DENOMINATOR:
            size = size * 0.0 + 1.0
        share = epsilon * size / GUARD
        if TARGET > NUMERATOR:
            share = 0.5 * share
        guard = -tl.log(share) - log_mass
        # Where exact scores would certify with independent values: c = z^2 |v| / (epsilon |o|)^2 on average.
        z = tl.load(p_params + TABLE)
        value = tl.sqrt(value2 / tl.maximum(mass, 1e-30))
        if TARGET == DENOMINATOR:
            value = value * 0.0 + 1.0
        start = 2.0 * tl.log(z / (epsilon * size)) + tl.log(tl.maximum(value, 1e-20)) - log_mass
        fixed_share = tl.sum(tl.where(o_s == SEGMENTS, masses, 0.0), 0) / tl.maximum(mass, 1e-30)
        own = o_g == g
        widths = tl.where(own, width, widths)
        guards = tl.where(own, guard, guards)
        starts = tl.where(own, start, starts)
        residuals = tl.where(own, tl.where(sampled, 1.0 - fixed_share, 0.0), residuals)

    m_g = o_g < G
    head = i_row * G + o_g
    used = tl.load(p_log_scale + head, mask=m_g, other=0.0)
    fixed = tl.load(p_fixed + head, mask=m_g, other=0.0)
    needs = 2.0 * tl.log(tl.maximum(widths, 1e-6) / epsilon)
    growth = tl.where(widths <= epsilon, 0.0, tl.minimum(needs + RETRY, MOST_GROWTH))
    growth = tl.maximum(growth, tl.where(used < guards - SLACK, guards - used, 0.0))
    growth = tl.where(m_g, growth, 0.0)
    room = tl.log(tl.maximum(cap * total.to(tl.float32), 1.0) / tl.maximum(expected, 1.0))
    limit = tl.where(cap >= 1.0, MOST_GROWTH + 60.0, room)
    tops = tl.max(growth, 0)
    if sampled & (tops > 0.0) & (whole == 0) & (LAST == 0):
        if limit > 0.02:
            tl.store(p_log_scale + head, used + tl.minimum(growth, limit), mask=m_g)
            tl.store(p_mode + i_row, EXHAUSTED if EXACT_NEXT else SAMPLED)
            return
    tl.store(p_mode + i_row, DONE)

    held = widths <= epsilon
    is_dense = mode == DENSE
    short = tl.where((cap < 1.0) & (limit <= 0.02 + RETRY), CAPPED, UNCERTIFIED)
    outcome = tl.where(held, CERTIFIED, short)
    outcome = tl.where(is_dense, SERVED_DENSELY, outcome)
    budget = tl.where(is_dense, 0, tl.where(sampled, count, total))
    o_c = tl.arange(0, 8)
    row = (
        tl.where(o_c == 0, read.to(tl.float32) / n.to(tl.float32), 0.0)
        + tl.where(o_c == 1, budget.to(tl.float32), 0.0)
        + tl.where(o_c == 4, read.to(tl.float32), 0.0)
    )[None, :]
    row = tl.where((o_c == 2)[None, :], widths[:, None], row)
    row = tl.where((o_c == 3)[None, :], outcome.to(tl.float32)[:, None], row)
    row = tl.where((o_c == 5)[None, :], residuals[:, None], row)
    tl.store(p_stats + head[:, None] * 6 + o_c[None, :], row, mask=m_g[:, None] & (o_c < 6)[None, :])

    # What the next step starts from: above this step's need, never below the guard, and within the cap.
    following = tl.where(sampled, used + tl.maximum(tl.minimum(needs + AIM, MOST_GROWTH), -DECAY), starts)
    following = tl.where(mode == EXHAUSTED, used + AIM, following)
    following = tl.maximum(following, guards)
    following = tl.where(sampled, tl.minimum(following, used + limit), following)
    state = p_state + (tl.load(p_state_rows + b) * HKV * G + h * G + o_g) * STATE
    tl.store(state + STATE_SCALE, following + fixed, mask=m_g)
    tl.store(state + STATE_CONTEXT, n.to(tl.float32) + tl.zeros([GP], tl.float32), mask=m_g)
    reads = tl.where(sampled, tl.maximum(expected, 1.0), 0.1 * total.to(tl.float32))
    tl.store(state + STATE_READS, reads + tl.zeros([GP], tl.float32), mask=m_g)

    # A captured graph pads its batch with rows of one token; a request that decodes has two at least.
    if n <= 1:
        return
    for g in tl.static_range(G):
        own = o_g == g
        which = tl.sum(tl.where(own, outcome, 0), 0)
        tl.atomic_add(p_counters + at_outcome + which, 1.0, sem="relaxed")
        if is_dense == 0:
            observe(p_counters + at_budget, p_budget_edges, budget.to(tl.float32), BUDGET_EDGES, BUDGET_EDGES_P)
            width = tl.sum(tl.where(own, widths, 0.0), 0)
            observe(p_counters + at_error, p_error_edges, width, ERROR_EDGES, ERROR_EDGES_P)
    group = tl.full([], G, tl.float64)
    tl.atomic_add(p_counters + at_context, group * n.to(tl.float64), sem="relaxed")
    if is_dense:
        tl.atomic_add(p_counters + at_read + 4, group * n.to(tl.float64), sem="relaxed")
    else:
        tl.atomic_add(p_counters + at_read, group * low.to(tl.float64), sem="relaxed")
        tl.atomic_add(p_counters + at_read + 1, group * (fixed_tokens - low).to(tl.float64), sem="relaxed")
        tl.atomic_add(p_counters + at_read + 3, group * budget.to(tl.float64), sem="relaxed")
