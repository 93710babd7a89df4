"""Stage ``combine``: merge a row's splits, certify or set the next scales, write output and counters.

A launch of its own after the first round: done by the last split to arrive inside ``attend``, it cost that 35 us. Later
rounds merge within theirs, see `vattn_kernels.triton.finish`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.reference.budget import GUARD_SHARE
from vattn_kernels.triton.layout import (
    BUDGET,
    DENOMINATOR,
    DENSE,
    DENSITY,
    DONE,
    EXHAUSTED,
    HALF_WIDTH,
    LISTS,
    MASS,
    MAXIMUM,
    NUM_PLANS,
    NUM_SCALARS,
    NUM_STATS,
    NUMERATOR,
    OUTCOME,
    OUTPUT,
    RESIDUAL_MASS,
    SAMPLED,
    SHARES,
    SPREAD,
    SQUARE,
    STATE_CONTEXT,
    STATE_READS,
    STATE_SCALE,
    TOP_K,
    await_signals,
    begin_next,
    is_padding,
    sampled_range,
)

LN2 = tl.constexpr(0.6931471805599453)
LEAST_UNIT = tl.constexpr(1e-15)
LEAST_MASS = tl.constexpr(1e-30)
LEAST_LOGIT = tl.constexpr(-1e30)
MOST_HALF_WIDTH = tl.constexpr(1e3)
# A token whose estimated share of the output exceeds epsilon / GUARD is read for certain; SLACK is how far a predicted
# scale may stay below that, in nats.
GUARD = tl.constexpr(GUARD_SHARE)
SLACK = tl.constexpr(0.35)
# The next step aims AIM nats above what this one needed and comes down by at most DECAY: a study of real attention,
# kernels/benchmarks/RESULTS.md. A retry adds RETRY_AIM to what the variance asks for.
AIM = tl.constexpr(0.6)
DECAY = tl.constexpr(0.15)
RETRY_AIM = tl.constexpr(0.15)
MOST_GROWTH = tl.constexpr(3.0)
# Bounds the logarithm of what a head asks for.
LEAST_SHARE = tl.constexpr(1e-9)
# What may follow a round.
MAY_RETRY = tl.constexpr(0)
MAY_READ_ALL = tl.constexpr(1)
LAST = tl.constexpr(2)
CERTIFIED = tl.constexpr(0)
UNCERTIFIED = tl.constexpr(1)
CAPPED = tl.constexpr(2)
SERVED_DENSELY = tl.constexpr(3)


@triton.jit
def half_width(variance, spread, unit, p_table, POINTS: tl.constexpr, PER_UNIT: tl.constexpr):
    """Relative half-width ``z sqrt(V) / unit``, z at ``nu = 2 / spread`` where ``spread`` is Var(V) / V^2."""
    # A row that does not take part may bring any number, and none may lead out of the table.
    x = spread * (0.5 * PER_UNIT)
    x = tl.where(x >= 0.0, tl.minimum(x, POINTS - 1.0), 0.0)
    j = tl.minimum(x.to(tl.int32), POINTS - 2)
    low, high = tl.load(p_table + j), tl.load(p_table + j + 1)
    z = low + (x - j.to(tl.float32)) * (high - low)
    return z * tl.sqrt(tl.maximum(variance, 0.0)) / unit


@triton.jit
def load_edges(p_edges, EDGES: tl.constexpr, EDGES_P: tl.constexpr):
    """Upper borders of a histogram's buckets."""
    o_e = tl.arange(0, EDGES_P)
    return tl.load(p_edges + o_e, mask=o_e < EDGES, other=float("inf"))


@triton.jit
def bucket_of(edges, values):
    """Bucket that each value falls into."""
    return tl.sum((edges[None, :] < values[:, None]).to(tl.int32), 1)


@triton.jit
def hits(o_c, entries, mask):
    """How often each counter ``o_c`` stands among ``entries``."""
    return tl.sum(((entries[None, :] == o_c[:, None]) & mask[None, :]).to(tl.int32), 1)


@triton.jit
def combine_fwd_kernel(
    p_outs, p_scalars, p_heads, p_seq_lens, p_mode, p_counts, p_attended,
    p_log_scale, p_fixed, p_reads, p_asked, p_arrivals, p_params, p_state, p_state_rows, p_budget_edges, p_error_edges,
    p_out, p_stats, p_counters, v_scale, sink, window, cap, at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, MOST: tl.constexpr, STATE: tl.constexpr, TARGET: tl.constexpr,
    TABLE: tl.constexpr, POINTS: tl.constexpr, PER_UNIT: tl.constexpr, BUDGET_EDGES: tl.constexpr,
    BUDGET_EDGES_P: tl.constexpr, ERROR_EDGES: tl.constexpr, ERROR_EDGES_P: tl.constexpr, COUNTERS_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """First round: one head a program."""
    begin_next(DEPENDENT)
    budget_edges = load_edges(p_budget_edges, BUDGET_EDGES, BUDGET_EDGES_P)
    error_edges = load_edges(p_error_edges, ERROR_EDGES, ERROR_EDGES_P)
    item = tl.program_id(0)
    await_signals(p_attended + item // G, SPLITS + 1, DEPENDENT)
    combine_head(
        item, tl.load(p_mode + item // G), SPLITS, MAY_RETRY, budget_edges, error_edges, p_outs, p_scalars, p_heads,
        p_seq_lens, p_mode, p_counts, p_log_scale, p_fixed, p_reads, p_asked, p_arrivals, None, p_params, p_state,
        p_state_rows, p_out, p_stats, p_counters, v_scale, sink, window, cap,
        at_context, at_read, at_outcome, at_budget, at_error,
        HKV, G, GP, WIDTH, D, DP, SPLITS, MOST, STATE, TARGET, False, TABLE, POINTS, PER_UNIT, COUNTERS_P, False,
    )  # fmt: skip


@triton.jit
def combine_round(
    rows, last, splits, p_outs, p_scalars, p_heads, p_seq_lens, p_mode, p_counts, p_log_scale, p_fixed, p_reads,
    p_asked, p_arrivals, p_plan, p_params, p_state, p_state_rows, p_budget_edges, p_error_edges, p_out, p_stats,
    p_counters, v_scale, sink, window, cap, at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, MOST: tl.constexpr, STATE: tl.constexpr, TARGET: tl.constexpr,
    EXACT: tl.constexpr, TABLE: tl.constexpr, POINTS: tl.constexpr, PER_UNIT: tl.constexpr,
    BUDGET_EDGES: tl.constexpr, BUDGET_EDGES_P: tl.constexpr, ERROR_EDGES: tl.constexpr, ERROR_EDGES_P: tl.constexpr,
    COUNTERS_P: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """A later round: the rows that took part in it, by all programs of a launch."""
    budget_edges = load_edges(p_budget_edges, BUDGET_EDGES, BUDGET_EDGES_P)
    error_edges = load_edges(p_error_edges, ERROR_EDGES, ERROR_EDGES_P)
    item = tl.program_id(0)
    while item < rows * G:
        mode = tl.load(p_mode + item // G, cache_modifier=".cg")
        if (mode >= DENSE) if EXACT else (mode == SAMPLED):
            combine_head(
                item, mode, splits, last, budget_edges, error_edges, p_outs, p_scalars, p_heads, p_seq_lens, p_mode,
                p_counts, p_log_scale, p_fixed, p_reads, p_asked, p_arrivals, p_plan, p_params, p_state, p_state_rows,
                p_out, p_stats, p_counters, v_scale, sink, window, cap, at_context, at_read, at_outcome, at_budget,
                at_error, HKV, G, GP, WIDTH, D, DP, SPLITS, MOST, STATE, TARGET, EXACT, TABLE, POINTS, PER_UNIT,
                COUNTERS_P, UNIFORM,
            )  # fmt: skip
        item += tl.num_programs(0)


@triton.jit
def combine_head(
    item, mode, splits, last, budget_edges, error_edges, p_outs, p_scalars, p_heads, p_seq_lens, p_mode, p_counts,
    p_log_scale, p_fixed, p_reads, p_asked, p_arrivals, p_plan, p_params, p_state, p_state_rows, p_out, p_stats,
    p_counters, v_scale, sink, window, cap, at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, MOST: tl.constexpr, STATE: tl.constexpr, TARGET: tl.constexpr,
    EXACT: tl.constexpr, TABLE: tl.constexpr, POINTS: tl.constexpr, PER_UNIT: tl.constexpr, COUNTERS_P: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """Merge one head of a row that took part in the round; the last of a group's heads decides for the group."""
    i_head, i_row = item % G, item // G
    # Loaded by every head, so that the last one, which decides, has not to wait for it.
    epsilon = tl.load(p_params)
    known = row_of_round(
        i_row, splits, p_seq_lens, p_state_rows, p_log_scale, p_fixed, p_counts, p_reads, p_asked, p_plan,
        HKV, G, GP, MOST, EXACT, UNIFORM,
    )  # fmt: skip
    # All is loaded and merged before the mode is asked, which saves a trip to memory; a row that does not take part
    # merges what is not its own, and drops it.
    wanted = (mode >= DENSE) if EXACT else (mode == SAMPLED)
    width, guard, start, residual = merge_head(
        i_row, i_head, splits, wanted, epsilon, p_outs, p_scalars, p_fixed, p_params, p_out, v_scale,
        G, WIDTH, D, DP, SPLITS, TARGET, EXACT, TABLE, POINTS, PER_UNIT, UNIFORM,
    )  # fmt: skip
    if wanted:
        p_result = p_heads + (i_row * G + i_head) * 4
        tl.store(p_result, width)
        tl.store(p_result + 1, guard)
        tl.store(p_result + 2, start)
        tl.store(p_result + 3, residual)
        tl.debug_barrier()
        if tl.atomic_add(p_arrivals + i_row, 1, sem="acq_rel") == G - 1:
            tl.store(p_arrivals + i_row, 0)
            o_g = tl.arange(0, GP)
            m_g = o_g < G
            p_results = p_heads + (i_row * G + o_g) * 4
            settle_group(
                i_row, mode, known, epsilon,
                tl.load(p_results, mask=m_g, other=0.0, cache_modifier=".cg"),
                tl.load(p_results + 1, mask=m_g, other=-1e9, cache_modifier=".cg"),
                tl.load(p_results + 2, mask=m_g, other=0.0, cache_modifier=".cg"),
                tl.load(p_results + 3, mask=m_g, other=0.0, cache_modifier=".cg"),
                p_mode, p_log_scale, p_asked, p_params, p_state, budget_edges, error_edges, p_stats, p_counters,
                sink, window, cap, last, at_context, at_read, at_outcome, at_budget, at_error,
                HKV, G, GP, STATE, EXACT, TABLE, COUNTERS_P, UNIFORM,
            )  # fmt: skip


@triton.jit
def row_of_round(
    i_row, splits, p_seq_lens, p_state_rows, p_log_scale, p_fixed, p_counts, p_reads, p_asked, p_plan,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, MOST: tl.constexpr, EXACT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """What a group decides by beside its heads' results.

    Context, row of the state, size of the top-k, log-scales and fixed masses of the heads; of every list its length and
    the expected one, which are not summed here: what is loaded later would wait for that; and what each head asks for.
    """
    o_g = tl.arange(0, GP)
    o_m = tl.arange(0, MOST)
    b = i_row // HKV
    own = (o_m < splits * LISTS) & (not EXACT)
    return (
        tl.load(p_seq_lens + b).to(tl.int32),
        tl.load(p_state_rows + b),
        tl.load(p_plan + i_row * NUM_PLANS + TOP_K) if UNIFORM else 0,
        # An earlier round of the same launch may have written it, on another multiprocessor.
        tl.load(p_log_scale + i_row * G + o_g, mask=o_g < G, other=0.0, cache_modifier=".cg"),
        tl.load(p_fixed + i_row * G + o_g, mask=o_g < G, other=0.0),
        tl.load(p_counts + i_row * MOST + o_m, mask=own, other=0, cache_modifier=".cg"),
        tl.load(p_reads + i_row * MOST + o_m, mask=own, other=0.0, cache_modifier=".cg"),
        tl.load(p_asked + i_row * G + o_g, mask=(o_g < G) & (not EXACT), other=1.0, cache_modifier=".cg"),
    )


@triton.jit
def load_tiles(i_row, row, splits, p_outs, WIDTH: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """One row of every split's tile ``[S, DP]``."""
    o_s = tl.arange(0, SPLITS)
    at = (i_row * (SPLITS + 1) + o_s).to(tl.int64)
    tile = p_outs + (at[:, None] * WIDTH + row) * DP + tl.arange(0, DP)[None, :]
    return tl.load(tile, mask=(o_s < splits)[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def load_scalars(i_row, row, splits, p_scalars, which: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One scalar ``[S]`` of one row of every split."""
    o_s = tl.arange(0, SPLITS)
    p_own = p_scalars + ((i_row * (SPLITS + 1) + o_s) * NUM_SCALARS + which) * WIDTH + row
    return tl.load(p_own, mask=o_s < splits, other=float("-inf") if which == MAXIMUM else 0.0, cache_modifier=".cg")


@triton.jit
def load_maxima(i_row, row, splits, p_scalars, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Largest logits in octaves; that of a split without a token is no number to subtract."""
    return tl.maximum(load_scalars(i_row, row, splits, p_scalars, MAXIMUM, WIDTH, SPLITS), LEAST_LOGIT)


@triton.jit
def load_last_tile(i_row, g, splits, p_outs, WIDTH: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """Output ``[DP]`` of one head in sink and window, the part behind the last split."""
    last = (i_row * (SPLITS + 1) + splits).to(tl.int64)
    return tl.load(p_outs + (last * WIDTH + g) * DP + tl.arange(0, DP), cache_modifier=".cg")


@triton.jit
def load_last_scalars(i_row, g, splits, p_scalars, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Largest logit and mass of one head in sink and window."""
    p_last = p_scalars + (i_row * (SPLITS + 1) + splits) * NUM_SCALARS * WIDTH + g
    maximum = tl.load(p_last + MAXIMUM * WIDTH, cache_modifier=".cg")
    return maximum, tl.load(p_last + MASS * WIDTH, cache_modifier=".cg")


@triton.jit
def merge_parts(maxima, masses, outs, last_maximum, last_mass, last_out):
    """Factors of the splits, largest logit, mass, output, and what of the mass is the last part's."""
    top = tl.maximum(tl.max(maxima, 0), last_maximum)
    f = tl.exp2(maxima - top)
    f_last = tl.exp2(last_maximum - top)
    last_mass *= f_last
    mass = tl.maximum(tl.sum(f * masses, 0) + last_mass, LEAST_MASS)
    return f, top, mass, (tl.sum(f[:, None] * outs, 0) + f_last * last_out) / mass, last_mass


@triton.jit
def merge_splits(
    i_row, g, splits, p_outs, p_scalars, WIDTH: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Output of one head that was read whole."""
    outs = load_tiles(i_row, g, splits, p_outs, WIDTH, DP, SPLITS)
    maxima = load_maxima(i_row, g, splits, p_scalars, WIDTH, SPLITS)
    masses = load_scalars(i_row, g, splits, p_scalars, MASS, WIDTH, SPLITS)
    least, none = tl.full([], LEAST_LOGIT, tl.float32), tl.full([], 0.0, tl.float32)
    _, _, _, out, _ = merge_parts(maxima, masses, outs, least, none, none)
    return out


@triton.jit
def merge_head(
    i_row, g, splits, wanted, epsilon, p_outs, p_scalars, p_fixed, p_params, p_out, v_scale,
    G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
    TARGET: tl.constexpr, EXACT: tl.constexpr, TABLE: tl.constexpr, POINTS: tl.constexpr, PER_UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """Store the output of one head; half-width, guard, first scale and residual mass for its group's decision."""
    o_d = tl.arange(0, DP)
    # All is loaded before anything is computed or stored, in one trip to memory.
    outs = load_tiles(i_row, g, splits, p_outs, WIDTH, DP, SPLITS)
    masses = load_scalars(i_row, g, splits, p_scalars, MASS, WIDTH, SPLITS)
    if not EXACT:
        # Read for certain, they add nothing to a variance.
        last_maximum, last_mass = load_last_scalars(i_row, g, splits, p_scalars, WIDTH, SPLITS)
        last_out = load_last_tile(i_row, g, splits, p_outs, WIDTH, DP, SPLITS)
        alongs = load_tiles(i_row, g + G, splits, p_outs, WIDTH, DP, SPLITS)
        plains = load_scalars(i_row, g + G, splits, p_scalars, MASS, WIDTH, SPLITS)
        spreads = load_scalars(i_row, g + G, splits, p_scalars, SPREAD, WIDTH, SPLITS)
        if TARGET != DENOMINATOR:
            squares = load_scalars(i_row, g + G, splits, p_scalars, SQUARE, WIDTH, SPLITS)
    else:
        last_maximum, last_mass = tl.full([], LEAST_LOGIT, tl.float32), tl.full([], 0.0, tl.float32)
        last_out = last_mass
    # Else the compiler loads first what it begins with, and waits for that before it asks for the rest.
    tl.debug_barrier()
    maxima = load_maxima(i_row, g, splits, p_scalars, WIDTH, SPLITS)
    f, top, mass, out, last_mass = merge_parts(maxima, masses, outs, last_maximum, last_mass, last_out)
    norm2 = tl.sum(out * out, 0)
    norm = tl.sqrt(norm2)
    tl.store(p_out + (i_row * G + g) * D + o_d, (out * v_scale).to(p_out.dtype.element_ty), mask=(o_d < D) & wanted)
    width = norm * 0.0
    residual = norm * 0.0
    if not EXACT:
        f2 = f * f
        plain = tl.sum(f2 * plains, 0)
        along = tl.sum(f2[:, None] * alongs, 0)
        unit_output = tl.maximum(mass * norm, LEAST_UNIT)
        # The spread is that of the weights w (w - 1) y^2 alone; what that does to the quantile is in RESULTS.md.
        spread = tl.sum(f2 * f2 * spreads, 0) / tl.maximum(plain * plain, 1e-37)
        if TARGET != DENOMINATOR:
            square = tl.sum(f2 * squares, 0)
        if (TARGET == DENOMINATOR) | (TARGET > NUMERATOR):
            width_mass = half_width(plain, spread, mass, p_params + TABLE, POINTS, PER_UNIT)
        if TARGET == OUTPUT:
            variance = square - 2 * tl.sum(out * along, 0) + norm2 * plain
            width = half_width(variance, spread, unit_output, p_params + TABLE, POINTS, PER_UNIT)
        elif TARGET == DENOMINATOR:
            width = width_mass
        else:
            width = half_width(square, spread, unit_output, p_params + TABLE, POINTS, PER_UNIT)
            if TARGET > NUMERATOR:
                width = 2 * (width_mass + width)
        width = tl.where(width < MOST_HALF_WIDTH, width, MOST_HALF_WIDTH)
        residual = 1.0 - last_mass / mass
    # A half-width is relative, but scores hold the norms of values as they are once scaled.
    size = tl.maximum(norm * v_scale, 1e-20)
    if TARGET == DENOMINATOR:
        size = size * 0.0 + 1.0
    log_mass = top * LN2 + tl.log(mass)
    if EXACT:
        residual = 1.0 - tl.exp(tl.minimum(tl.load(p_fixed + i_row * G + g) - log_mass, 0.0))
    share = epsilon * size / GUARD
    if TARGET > NUMERATOR:
        share = 0.5 * share
    guard = -tl.log(share) - log_mass
    start = -log_mass
    if not UNIFORM:
        # Where exact scores would certify: c = z^2 |v| / (epsilon |o|)^2, with values twice as long as their mean.
        start += 2.0 * tl.log(tl.load(p_params + TABLE) / epsilon) + tl.log(2.0 / size)
    return width, guard, start, residual


@triton.jit
def settle_group(
    i_row, mode, known, epsilon, widths, guards, starts, residuals, p_mode, p_log_scale, p_asked, p_params, p_state,
    budget_edges, error_edges, p_stats, p_counters,
    sink, window, cap, last, at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, STATE: tl.constexpr, EXACT: tl.constexpr,
    TABLE: tl.constexpr, COUNTERS_P: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Send a group into another round, or close its step.

    ``last`` is what may follow: another draw, exact attention, or nothing.

    The next step's scale lies above what this one needed and the guard, or where a head asks for less than its least
    share as far towards that as MOST_GROWTH goes; within the cap as far as this step's scores and survey tell.
    """
    n, request, top_k, used, fixed, counts, reads, asked = known
    low, high = sampled_range(n, sink, window)
    total = high - low
    fixed_tokens = n - total
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    head = i_row * G + o_g
    top_k = tl.where(mode == EXHAUSTED, top_k, 0)
    budget, read, expected = total - top_k, n, 0.1 * total.to(tl.float32)
    limit = epsilon * 0.0 + 60.0
    if not EXACT:
        budget = tl.sum(counts, 0)
        expected = tl.maximum(tl.sum(reads, 0), 1.0)
        read = fixed_tokens + budget
        if cap < 1.0:
            limit = tl.log(tl.maximum(cap * total.to(tl.float32), 1.0) / expected)
        # Once everything was read nothing is left to estimate.
        widths = tl.where(budget == total, 0.0, widths)
    needs = 2.0 * tl.log(tl.maximum(widths, 1e-6) / epsilon)
    following = starts
    again = False
    if not EXACT:
        # The first round surveyed shares, and left for this one the tokens that they come to.
        own = asked * tl.where(last == MAY_RETRY, expected, 1.0)
        growth = tl.where(widths <= epsilon, 0.0, tl.minimum(needs + RETRY_AIM, MOST_GROWTH))
        growth = tl.maximum(growth, tl.where((used < guards - SLACK) & (budget < total), guards - used, 0.0))
        growth = tl.where(m_g, growth, 0.0)
        if last < LAST:
            again = (tl.max(growth, 0) > 0.0) & (limit > 0.02)
            growth = tl.where(again, tl.minimum(growth, limit), 0.0)
            tl.store(p_log_scale + head, used + growth, mask=m_g)
            tl.store(p_asked + head, own * tl.exp(growth), mask=m_g)
        change = needs + AIM
        # Far above its need a scale comes down by half the way, less one.
        change = tl.maximum(change, tl.minimum(0.5 * (change + 1.0), -DECAY))
        following = tl.maximum(used + tl.minimum(change, MOST_GROWTH), guards)
        # What a head lacks it gets, and the cap makes room for it; by chance a survey sees nothing of some head.
        share = tl.maximum(own / expected, LEAST_SHARE) * (G * SHARES)
        lacks = tl.minimum(tl.maximum(-tl.log(share), 0.0), MOST_GROWTH)
        gained = tl.sum(tl.where(m_g, share * (tl.exp(lacks) - 1.0), 0.0), 0) / (G * SHARES)
        following = tl.where(lacks > 0.0, tl.maximum(following, used + lacks), following)
        following = tl.minimum(following, used + lacks + (limit - tl.log(1.0 + gained)))
    elif not UNIFORM:
        if cap < 1.0:
            # The first scale reads cap tokens where its values are twice as long as their mean.
            certain = 2.0 * tl.log(2.0 * tl.load(p_params + TABLE) / epsilon)
            starts = tl.minimum(starts, starts - certain + tl.log(tl.maximum(cap * total.to(tl.float32), 1.0)))
        following = tl.where(mode == EXHAUSTED, tl.maximum(used + AIM, guards), starts)
    if again:
        if last == MAY_READ_ALL:
            tl.store(p_mode + i_row, EXHAUSTED)
    else:
        short = tl.where(limit <= 0.02 + RETRY_AIM, CAPPED, UNCERTIFIED)
        close_group(
            i_row, mode, widths, residuals, following + fixed, expected, tl.where(widths <= epsilon, CERTIFIED, short),
            n, request, low, total, top_k, budget, read,
            p_mode, p_state, budget_edges, error_edges, p_stats, p_counters,
            at_context, at_read, at_outcome, at_budget, at_error,
            HKV, G, GP, STATE, COUNTERS_P,
        )  # fmt: skip


@triton.jit
def close_group(
    i_row, mode, widths, residuals, following, expected, outcome, n, request, low, total, top_k, budget, read,
    p_mode, p_state, budget_edges, error_edges, p_stats, p_counters,
    at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, STATE: tl.constexpr, COUNTERS_P: tl.constexpr,
):  # fmt: skip
    """Write statistics and counters, and what the next step starts from."""
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    head = i_row * G + o_g
    tl.store(p_mode + i_row, DONE)
    state = p_state + (request * HKV * G + i_row % HKV * G + o_g) * STATE
    # A graph runner gives all padded rows one row of state, which may be a request's.
    m_s = m_g & (not is_padding(n))
    tl.store(state + STATE_SCALE, following, mask=m_s)
    tl.store(state + STATE_CONTEXT, n.to(tl.float32) + following * 0.0, mask=m_s)
    tl.store(state + STATE_READS, expected + following * 0.0, mask=m_s)

    # A padded row went through the first round, and is told as what it is, read whole.
    is_dense = (mode == DENSE) | is_padding(n)
    outcome = tl.where(is_dense, SERVED_DENSELY, outcome)
    budget = tl.where(is_dense, 0, budget)
    residuals = tl.where(is_dense, 0.0, residuals)
    o_c = tl.arange(0, 8)
    density = read.to(tl.float32) / tl.maximum(n, 1).to(tl.float32)
    shared = tl.where(o_c == DENSITY, density, tl.where(o_c == BUDGET, budget.to(tl.float32), read.to(tl.float32)))
    row = tl.where((o_c == HALF_WIDTH)[None, :], widths[:, None], shared[None, :])
    row = tl.where((o_c == OUTCOME)[None, :], outcome.to(tl.float32)[:, None], row)
    row = tl.where((o_c == RESIDUAL_MASS)[None, :], residuals[:, None], row)
    tl.store(p_stats + head[:, None] * NUM_STATS + o_c[None, :], row, mask=m_g[:, None] & (o_c < NUM_STATS)[None, :])
    count_group(
        n, low, total, top_k, budget, is_dense, outcome, widths, m_g, budget_edges, error_edges, p_counters,
        at_context, at_read, at_outcome, at_budget, at_error, G, COUNTERS_P,
    )  # fmt: skip


@triton.jit
def count_group(
    n, low, total, top_k, budget, is_dense, outcome, widths, m_g, budget_edges, error_edges, p_counters,
    at_context, at_read, at_outcome, at_budget, at_error, G: tl.constexpr, COUNTERS_P: tl.constexpr,
):  # fmt: skip
    """Add a group's step to the counters at once: groups that add to the same few addresses wait for each other."""
    o_c = tl.arange(0, COUNTERS_P)
    tokens = tl.where(o_c == at_context, n, 0)
    entries = hits(o_c, at_outcome + outcome, m_g)
    sums = tl.zeros([COUNTERS_P], tl.float32)
    if is_dense:
        tokens += tl.where(o_c == at_read + 4, n, 0)
    else:
        tokens += tl.where(o_c == at_read, low, 0) + tl.where(o_c == at_read + 1, n - total - low, 0)
        tokens += tl.where(o_c == at_read + 2, top_k, 0)
        tokens += tl.where((o_c == at_read + 3) | (o_c == at_budget), budget, 0)
        budgets = budget.to(tl.float32) + widths * 0.0
        entries += hits(o_c, at_budget + 1 + bucket_of(budget_edges, budgets), m_g)
        entries += hits(o_c, at_error + 1 + bucket_of(error_edges, widths), m_g)
        sums = tl.where(o_c == at_error, tl.sum(tl.where(m_g, widths, 0.0), 0), 0.0)
    row = (tokens * G + entries).to(tl.float64) + sums.to(tl.float64)
    tl.atomic_add(p_counters + o_c, row, mask=(row != 0.0) & (not is_padding(n)), sem="relaxed")
