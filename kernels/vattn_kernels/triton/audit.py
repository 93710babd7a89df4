"""Stage ``audit``: the true error of some rows, by exact attention beside what was served.

``choose`` marks rows as if they were to be read whole, ``finish`` reads them, ``audit`` compares and counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.combine import SERVED_DENSELY, bucket_of, hits, load_edges, merge_splits
from vattn_kernels.triton.layout import DENSE, DONE, NUM_STATS, OUTCOME, await_last, begin_next
from vattn_kernels.triton.select import key_of, uniform

# Added to the seed, so that what is audited does not follow from what was drawn.
AUDIT_SEED = tl.constexpr(0x5BD1E995)


@triton.jit(do_not_specialize=["seed", "layer"])
def choose_fwd_kernel(
    p_seq_lens, p_stats, p_mode, seed, layer, rate,
    HKV: tl.constexpr, G: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Mark each row that was sampled with probability ``rate``."""
    begin_next(DEPENDENT)
    await_last(DEPENDENT)
    i_row = tl.program_id(0)
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    u = uniform(b, key_of(seed.to(tl.uint32) + AUDIT_SEED, layer, h, n))
    # All heads of a row have one outcome where it was read whole.
    outcome = tl.load(p_stats + i_row * G * NUM_STATS + OUTCOME)
    tl.store(p_mode + i_row, tl.where((u < rate) & (outcome != SERVED_DENSELY), DENSE, DONE))


@triton.jit
def audit_fwd_kernel(
    p_outs, p_scalars, p_mode, p_used, p_params, p_audit_edges, p_out, p_counters, v_scale,
    at_audit, at_audit_error,
    G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
    AUDIT_EDGES: tl.constexpr, AUDIT_EDGES_P: tl.constexpr, COUNTERS_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Count the relative error of every head of the marked rows, and whether it exceeds epsilon."""
    begin_next(DEPENDENT)
    await_last(DEPENDENT)
    i_row = tl.program_id(0)
    if tl.load(p_mode + i_row) == DENSE:
        splits = tl.load(p_used)
        o_g = tl.arange(0, GP)
        o_d = tl.arange(0, DP)
        errors = tl.zeros([GP], tl.float32)
        for g in tl.static_range(G):
            exact = merge_splits(i_row, g, splits, p_outs, p_scalars, WIDTH, DP, SPLITS)
            served = tl.load(p_out + (i_row * G + g) * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            exact *= v_scale
            gap = served - exact
            error = tl.sqrt(tl.sum(gap * gap, 0) / tl.maximum(tl.sum(exact * exact, 0), 1e-37))
            errors = tl.where(o_g == g, error, errors)
        m_g = o_g < G
        violations = tl.sum(((errors > tl.load(p_params)) & m_g).to(tl.int32), 0)
        edges = load_edges(p_audit_edges, AUDIT_EDGES, AUDIT_EDGES_P)
        o_c = tl.arange(0, COUNTERS_P)
        entries = tl.where(o_c == at_audit, G, 0) + tl.where(o_c == at_audit + 1, violations, 0)
        entries += hits(o_c, at_audit_error + 1 + bucket_of(edges, errors), m_g)
        sums = tl.where(o_c == at_audit_error, tl.sum(tl.where(m_g, errors, 0.0), 0), 0.0)
        row = entries.to(tl.float64) + sums.to(tl.float64)
        tl.atomic_add(p_counters + o_c, row, mask=row != 0.0, sem="relaxed")
        tl.store(p_mode + i_row, DONE)
