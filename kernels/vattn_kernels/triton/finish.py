"""Stage ``finish``: the rounds after the first, attend to the rows that are open, wait for all programs, merge.

Mostly no row is open and the launch ends after one load; a launch for every round would cost that again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.attend import attend_everything, attend_list
from vattn_kernels.triton.combine import LAST, MAY_READ_ALL, combine_round
from vattn_kernels.triton.layout import DENOMINATOR, DENSE, SAMPLED, await_last, begin_next
from vattn_kernels.triton.select import select_split


@triton.jit
def open_rows(p_mode, rows, ROWS_P: tl.constexpr):
    """Number of rows that draw again, and of those that are read whole."""
    o_r = tl.arange(0, ROWS_P)
    modes = tl.load(p_mode + o_r, mask=o_r < rows, other=0, cache_modifier=".cg")
    # One sum for both: a row counts in the lower or the upper half.
    both = tl.sum(
        tl.where(modes == SAMPLED, 1, 0).to(tl.int64) + (tl.where(modes >= DENSE, 1, 0).to(tl.int64) << 32), 0
    )
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def splits_for(wanted, items, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Splits of each open row: a power of two up to ``SPLITS`` that makes about ``items`` of them."""
    used = wanted * 0 + SPLITS
    for _ in tl.static_range(6):
        used = tl.where((used > LEAST) & (used * wanted > items), used // 2, used)
    return used


@triton.jit
def await_all(p_barrier):
    """Wait until every program of the launch has come here; what each has stored may then be loaded, past the L1 cache.

    All programs must run at once: the launch is a cooperative one, which CUDA refuses where they cannot. The barrier
    holds how many have come, and how often all had.
    """
    tl.debug_barrier()
    times = tl.atomic_add(p_barrier + 1, 0, sem="acquire")
    if tl.atomic_add(p_barrier, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(p_barrier, 0)
        tl.atomic_add(p_barrier + 1, 1, sem="release")
    else:
        while tl.atomic_add(p_barrier + 1, 0, sem="acquire") == times:
            pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["seed", "layer", "sink"])
def finish_fwd_kernel(
    p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_mode, p_entries, p_counts, p_outs, p_scalars,
    p_codes, p_norms, p_fields, p_query, p_bias, p_scale, p_used, p_barrier,
    p_heads, p_log_scale, p_fixed, p_reads, p_asked, p_arrivals, p_params, p_state, p_state_rows, p_budget_edges,
    p_error_edges, p_out, p_stats, p_counters,
    sm_scale, v_scale, sink, window, seed, layer, rows, items, kv_stride, k_stride, code_head, norm_head, capacity,
    cap, at_context, at_read, at_outcome, at_budget, at_error, p_valid, row_stride, p_plan,
    HKV: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    EXACT_BN: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, TARGET: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, DP4A: tl.constexpr, ROWS_P: tl.constexpr,
    GP: tl.constexpr, STATE: tl.constexpr, TABLE: tl.constexpr, POINTS: tl.constexpr,
    PER_UNIT: tl.constexpr, BUDGET_EDGES: tl.constexpr, BUDGET_EDGES_P: tl.constexpr, ERROR_EDGES: tl.constexpr,
    ERROR_EDGES_P: tl.constexpr, COUNTERS_P: tl.constexpr,
    CAPPED: tl.constexpr, SELECTOR: tl.constexpr, UNIFORM: tl.constexpr, AUDIT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Second draw for the rows that the first left open, then exact attention for those that are to be read whole.

    Sampler ``uniform`` and an audit come here for the second part alone; an audit merges by itself.
    """
    begin_next(DEPENDENT)
    await_last(DEPENDENT)
    drawn, whole = open_rows(p_mode, rows, ROWS_P)
    if drawn + whole == 0:
        return
    if not (UNIFORM | AUDIT):
        if drawn > 0:
            splits = splits_for(drawn, items, SPLITS, LEAST)
            item = tl.program_id(0)
            while item < rows * (splits + 1):
                i_row, i_split = item // (splits + 1), item % (splits + 1)
                if tl.load(p_mode + i_row) == SAMPLED:
                    if i_split < splits:
                        select_split(
                            i_row, i_split, splits, p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
                            p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
                            sink, window, seed, layer, kv_stride, code_head, norm_head, capacity,
                            p_valid, p_v, sm_scale, row_stride,
                            HKV, G, D, R, GROUPS, WORDS, TARGET != DENOMINATOR, MOST, DP4A, SELECTOR,
                        )  # fmt: skip
                    tl.debug_barrier()
                    attend_list(
                        i_row, i_split, splits, p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_entries, p_counts,
                        p_outs, p_scalars, sm_scale, sink, window, kv_stride, k_stride, capacity,
                        HKV, G, WIDTH, D, DP, BN, SPLITS, MOST, TARGET, WIDE,
                    )  # fmt: skip
                item += tl.num_programs(0)
            await_all(p_barrier)
            combine_round(
                rows, LAST if CAPPED else MAY_READ_ALL, splits, p_outs, p_scalars, p_heads, p_seq_lens, p_mode,
                p_counts, p_log_scale, p_fixed, p_reads, p_asked, p_arrivals, None, p_params, p_state, p_state_rows,
                p_budget_edges, p_error_edges, p_out, p_stats, p_counters,
                v_scale, sink, window, cap, at_context, at_read, at_outcome, at_budget, at_error,
                HKV, G, GP, WIDTH, D, DP, SPLITS, MOST, STATE, TARGET, False, TABLE, POINTS, PER_UNIT,
                BUDGET_EDGES, BUDGET_EDGES_P, ERROR_EDGES, ERROR_EDGES_P, COUNTERS_P, False,
            )  # fmt: skip
            if not CAPPED:
                await_all(p_barrier)
                _, whole = open_rows(p_mode, rows, ROWS_P)
    if whole > 0:
        splits = splits_for(whole, items, SPLITS, LEAST)
        tl.store(p_used, splits)
        item = tl.program_id(0)
        while item < rows * splits:
            i_row, i_split = item // splits, item % splits
            if tl.load(p_mode + i_row, cache_modifier=".cg") >= DENSE:
                attend_everything(
                    i_row, i_split, splits, p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_outs, p_scalars, sm_scale,
                    kv_stride, k_stride, HKV, G, WIDTH, D, DP, EXACT_BN, SPLITS, STAGES,
                )  # fmt: skip
            item += tl.num_programs(0)
        if not AUDIT:
            await_all(p_barrier)
            combine_round(
                rows, LAST, splits, p_outs, p_scalars, p_heads, p_seq_lens, p_mode, p_counts, p_log_scale, p_fixed,
                p_reads, p_asked, p_arrivals, p_plan, p_params, p_state, p_state_rows, p_budget_edges, p_error_edges,
                p_out, p_stats, p_counters,
                v_scale, sink, window, cap, at_context, at_read, at_outcome, at_budget, at_error,
                HKV, G, GP, WIDTH, D, DP, SPLITS, MOST, STATE, TARGET, True, TABLE, POINTS, PER_UNIT,
                BUDGET_EDGES, BUDGET_EDGES_P, ERROR_EDGES, ERROR_EDGES_P, COUNTERS_P, UNIFORM,
            )  # fmt: skip
