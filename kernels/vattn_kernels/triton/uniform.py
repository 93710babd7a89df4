"""Sampler ``uniform``, second half: list the top-k and a sample of the rest, then the budget that its spread asks for.

The math is `vattn_kernels.reference.uniform`. ``attend`` reads the lists of either sampler: the first splits hold the
top-k at probability 1, the others the sample at ``b / M``, so that what a merge takes of the latter are the sums of
the sample alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.reference.decode import ROUNDING as ROUNDING_SHARE
from vattn_kernels.reference.rng import ROUNDS as FEISTEL_ROUNDS
from vattn_kernels.triton.combine import (
    CAPPED,
    CERTIFIED,
    LEAST_UNIT,
    LN2,
    MOST_HALF_WIDTH,
    UNCERTIFIED,
    close_group,
    half_width,
    load_edges,
    load_last_scalars,
    load_last_tile,
    load_maxima,
    load_scalars,
    load_tiles,
    merge_parts,
)
from vattn_kernels.triton.layout import (
    CUT_HEADS,
    DENOMINATOR,
    EXHAUSTED,
    LAST_TIE,
    LISTS,
    MASS,
    NUM_PLANS,
    NUMERATOR,
    OUTPUT,
    SAMPLE_SIZE,
    SAMPLED,
    SPLIT_BORDER,
    SQUARE,
    THRESHOLD,
    TOP_K,
    store_entries,
)
from vattn_kernels.triton.select import GOLDEN, key_of, mix
from vattn_kernels.triton.top_k import CHUNK, WHOLE, ranks_at, splits_of_members

ROUNDING = tl.constexpr(ROUNDING_SHARE)
ROUNDS = tl.constexpr(FEISTEL_ROUNDS)
WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def shuffle(x, half, key):
    """A keyed permutation of ``[0, 4^half)``: a balanced Feistel network."""
    mask = (1 << half) - 1
    left, right = x >> half, x & mask
    for r in tl.static_range(ROUNDS):
        left, right = right, (left ^ mix(right + (key + ((r * GOLDEN) & WORD)))) & mask
    return (left << half) | right


@triton.jit
def permuted(index, total, half, key):
    """Images of a keyed permutation of ``[0, total)``, `vattn_kernels.reference.rng.permutation`."""
    x = shuffle(index, half, key)
    outside = (x >= total).to(tl.int32)
    while tl.sum(outside, 0) > 0:
        x = tl.where(outside > 0, shuffle(x, half, key), x)
        outside = (x >= total).to(tl.int32)
    return x


@triton.jit
def is_member(rank, index, threshold, last_tie):
    """Whether tokens belong to the top-k."""
    return (rank > threshold) | ((rank == threshold) & (index <= last_tie))


@triton.jit
def append_evenly(chosen, found, slot, pi, first, lists, span, p_entries):
    """Deal the chosen tokens out to ``lists`` lists in turn, behind ``found`` earlier ones; how many there are then."""
    entry = found + tl.cumsum(chosen.to(tl.int32), 0) - 1
    store_entries(p_entries, first + (entry % lists) * span + entry // lists, slot, pi, chosen)
    return found + tl.sum(chosen.to(tl.int32), 0)


@triton.jit(do_not_specialize=["seed", "layer", "sink"])
def list_fwd_kernel(
    p_kv_indices, p_seq_lens, p_mode, p_ranks, p_plan, p_entries, p_counts,
    sink, window, seed, layer, kv_stride, capacity,
    HKV: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Two programs a row: one lists the top-k, one the first tokens of the permuted range that are none of it."""
    i_row = tl.program_id(0) // 2
    if tl.load(p_mode + i_row) != SAMPLED:
        return
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    total = n - window - sink
    p_own = p_plan + i_row * NUM_PLANS
    threshold = tl.load(p_own + THRESHOLD).to(tl.uint32, bitcast=True)
    last_tie, top_k = tl.load(p_own + LAST_TIE), tl.load(p_own + TOP_K)
    size, border = tl.load(p_own + SAMPLE_SIZE), tl.load(p_own + SPLIT_BORDER)
    span = capacity // (SPLITS * LISTS)
    row = i_row.to(tl.int64) * capacity
    p_own_ranks = p_ranks + row
    p_range = p_kv_indices + b.to(tl.int64) * kv_stride + sink
    o_n = tl.arange(0, CHUNK)
    o_l = tl.arange(0, SPLITS * LISTS)
    of_members = border * LISTS
    of_sample = SPLITS * LISTS - of_members
    p_lengths = p_counts + i_row * MOST + o_l
    if tl.program_id(0) % 2 == 0:
        lists = tl.maximum(of_members, 1)
        tl.store(p_lengths, (top_k - o_l + lists - 1) // lists, mask=o_l < of_members)
        found = top_k * 0
        for start in range(0, total, CHUNK):
            index = start + o_n
            rank = ranks_at(p_own_ranks, index, index < total)
            chosen = (index < total) & is_member(rank, index, threshold, last_tie)
            slot = tl.load(p_range + index, mask=chosen, other=0)
            found = append_evenly(chosen, found, slot, tl.full([CHUNK], 1.0, tl.float32), row, lists, span, p_entries)
    else:
        tl.store(p_lengths, (size - (o_l - of_members) + of_sample - 1) // of_sample, mask=o_l >= of_members)
        pi = size.to(tl.float32) / (total - top_k).to(tl.float32) + tl.zeros([CHUNK], tl.float32)
        half = 1
        for i in tl.static_range(1, 15):
            half += (total > (1 << (2 * i))).to(tl.int32)
        key = key_of(seed, layer, h, n)
        found = size * 0
        start = size * 0
        while (found < size) & (start < total):
            index = start + o_n
            image = permuted(tl.where(index < total, index, 0).to(tl.uint32), total, half, key).to(tl.int32)
            rank = ranks_at(p_own_ranks, image, index < total)
            open_ = (index < total) & (is_member(rank, image, threshold, last_tie) == 0)
            chosen = open_ & (found + tl.cumsum(open_.to(tl.int32), 0) <= size)
            slot = tl.load(p_range + image, mask=chosen, other=0)
            found = append_evenly(chosen, found, slot, pi, row + of_members * span, of_sample, span, p_entries)
            start += CHUNK


@triton.jit
def part_width(square, mean2, size, population, unit, p_table, POINTS: tl.constexpr, PER_UNIT: tl.constexpr):
    """``z M sigma sqrt(1/b - 1/M) / unit`` of one part, from the sums ``|x|^2`` and ``|sum x|^2`` of its sample."""
    b, m = size.to(tl.float32), population.to(tl.float32)
    freedom = tl.maximum(b - 1.0, 1.0)
    variance = tl.maximum(square - mean2 / b, 0.0) / freedom
    return half_width(m * variance * (m - b) / b, 2.0 / freedom, unit, p_table, POINTS, PER_UNIT)


@triton.jit(do_not_specialize=["sink"])
def budget_fwd_kernel(
    p_outs, p_scalars, p_seq_lens, p_mode, p_plan, p_fixed, p_params, p_state, p_state_rows, p_budget_edges,
    p_error_edges, p_out, p_stats, p_counters,
    v_scale, sink, window, cap, capacity, at_context, at_read, at_outcome, at_budget, at_error,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, STATE: tl.constexpr, TARGET: tl.constexpr, TABLE: tl.constexpr, POINTS: tl.constexpr,
    PER_UNIT: tl.constexpr, BUDGET_EDGES: tl.constexpr, BUDGET_EDGES_P: tl.constexpr, ERROR_EDGES: tl.constexpr,
    ERROR_EDGES_P: tl.constexpr, COUNTERS_P: tl.constexpr, IS_PILOT: tl.constexpr,
):  # fmt: skip
    """Merge one row; after the pilot plan the sample that its spread asks for, else close the step.

    The budget is `vattn_kernels.reference.budget.sample_size` of the group's widest head, within the cap.
    """
    i_row = tl.program_id(0)
    if tl.load(p_mode + i_row) != SAMPLED:
        return
    n = tl.load(p_seq_lens + i_row // HKV).to(tl.int32)
    total = n - window - sink
    p_own = p_plan + i_row * NUM_PLANS
    top_k, size = tl.load(p_own + TOP_K), tl.load(p_own + SAMPLE_SIZE)
    population = total - top_k
    epsilon = tl.load(p_params)
    p_table = p_params + TABLE
    # As ``attend`` has it, of the probability that the lists hold.
    pi = size.to(tl.float32) / population.to(tl.float32)
    excess = tl.maximum((1.0 / pi) * (1.0 / pi - 1.0), 1e-30)
    is_sampled = tl.arange(0, SPLITS) >= tl.load(p_own + SPLIT_BORDER)
    o_d = tl.arange(0, DP)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    widths = tl.zeros([GP], tl.float32)
    log_masses = tl.zeros([GP], tl.float32)
    residuals = tl.zeros([GP], tl.float32)
    for g in range(G):
        outs = load_tiles(i_row, g, SPLITS, p_outs, WIDTH, DP, SPLITS)
        last_out = load_last_tile(i_row, g, SPLITS, p_outs, WIDTH, DP, SPLITS)
        maxima = load_maxima(i_row, g, SPLITS, p_scalars, WIDTH, SPLITS)
        masses = load_scalars(i_row, g, SPLITS, p_scalars, MASS, WIDTH, SPLITS)
        last_maximum, last_mass = load_last_scalars(i_row, g, SPLITS, p_scalars, WIDTH, SPLITS)
        plains = load_scalars(i_row, g + G, SPLITS, p_scalars, MASS, WIDTH, SPLITS)
        f, top, mass, out, last_mass = merge_parts(maxima, masses, outs, last_maximum, last_mass, last_out)
        norm2 = tl.sum(out * out, 0)
        p_head = p_out + (i_row * G + g) * D + o_d
        tl.store(p_head, (out * v_scale).to(p_out.dtype.element_ty), mask=o_d < D)
        unit_output = tl.maximum(mass * tl.sqrt(norm2), LEAST_UNIT)
        f2 = f * f
        plain = tl.sum(f2 * plains, 0) / excess
        sample_mass = tl.sum(tl.where(is_sampled, f * masses, 0.0), 0) * pi
        if TARGET != DENOMINATOR:
            squares = load_scalars(i_row, g + G, SPLITS, p_scalars, SQUARE, WIDTH, SPLITS)
            square = tl.sum(f2 * squares, 0) / excess
            sample_out = tl.sum(tl.where(is_sampled[:, None], f[:, None] * outs, 0.0), 0) * pi
        if TARGET == OUTPUT:
            alongs = load_tiles(i_row, g + G, SPLITS, p_outs, WIDTH, DP, SPLITS)
            along = tl.sum(f2[:, None] * alongs, 0) / excess
            square = square - 2 * tl.sum(out * along, 0) + norm2 * plain
            gap = sample_out - out * sample_mass
            width = part_width(square, tl.sum(gap * gap, 0), size, population, unit_output, p_table, POINTS, PER_UNIT)
        if (TARGET == DENOMINATOR) | (TARGET > NUMERATOR):
            width = part_width(plain, sample_mass * sample_mass, size, population, mass, p_table, POINTS, PER_UNIT)
        if TARGET >= NUMERATOR:
            mean2 = tl.sum(sample_out * sample_out, 0)
            own = part_width(square, mean2, size, population, unit_output, p_table, POINTS, PER_UNIT)
            width = 2 * (width + own) if TARGET > NUMERATOR else own
        width = tl.where(width < MOST_HALF_WIDTH, width, MOST_HALF_WIDTH)
        widths = tl.where(o_g == g, width, widths)
        log_masses = tl.where(o_g == g, top * LN2 + tl.log(mass), log_masses)
        residuals = tl.where(o_g == g, 1.0 - last_mass / mass, residuals)
    widths = tl.where(size == population, 0.0, widths)
    is_cut = ((tl.load(p_own + CUT_HEADS) >> o_g) & 1) > 0
    if IS_PILOT:
        b, m = size.to(tl.float32), population.to(tl.float32)
        infinite = (widths / epsilon) * (widths / epsilon) * (m * b / tl.maximum(m - b, 1.0))
        needed = tl.minimum(tl.ceil(m * (infinite / (m + infinite))).to(tl.int32), population)
        most = tl.floor(cap * total.to(tl.float32) * (1.0 + WHOLE)).to(tl.int32)
        most = tl.minimum(tl.maximum(most, size), population)
        is_cut = needed > most
        wanted = tl.max(tl.where(m_g, tl.minimum(needed, most), 0), 0)
        if wanted > size:
            border = splits_of_members(top_k, wanted, capacity // (SPLITS * LISTS), SPLITS)
            tl.store(p_own + SAMPLE_SIZE, wanted)
            tl.store(p_own + SPLIT_BORDER, border)
            tl.store(p_own + CUT_HEADS, tl.sum(tl.where(is_cut & m_g, 1 << o_g, 0), 0))
            if (wanted == population) | (border < 0):
                tl.store(p_mode + i_row, EXHAUSTED)
            return
    outcome = tl.where(widths <= epsilon * (1.0 + ROUNDING), CERTIFIED, UNCERTIFIED)
    fixed = tl.load(p_fixed + i_row * G + o_g, mask=m_g, other=0.0)
    close_group(
        i_row, SAMPLED, widths, residuals, fixed - log_masses, size.to(tl.float32), tl.where(is_cut, CAPPED, outcome),
        n, tl.load(p_state_rows + i_row // HKV), sink, total, top_k, size, n - total + top_k + size,
        p_mode, p_state, load_edges(p_budget_edges, BUDGET_EDGES, BUDGET_EDGES_P),
        load_edges(p_error_edges, ERROR_EDGES, ERROR_EDGES_P), p_stats, p_counters,
        at_context, at_read, at_outcome, at_budget, at_error,
        HKV, G, GP, STATE, COUNTERS_P,
    )  # fmt: skip
