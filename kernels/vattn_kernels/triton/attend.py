"""Stage ``attend``: attention over the lists with what the error estimate needs, or over everything, in splits."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.layout import (
    DENOMINATOR,
    ENTRY,
    LISTS,
    LOG2E,
    MASS,
    MAXIMUM,
    NUM_SCALARS,
    SAMPLED,
    SPREAD,
    SQUARE,
    await_each,
    await_signals,
    begin_next,
    probabilities_of,
    sampled_range,
    signal,
)
from vattn_kernels.triton.survey import survey_row


@triton.jit
def accumulate(p, v, acc, WIDE: tl.constexpr):
    """``acc + p v``; weights of a variance leave the range of float16, so that takes tf32."""
    if WIDE:
        return tl.dot(p, v.to(tl.float32), acc, input_precision="tf32")
    return tl.dot(p.to(v.dtype), v, acc)


@triton.jit
def attend_fwd_kernel(
    p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_mode, p_entries, p_counts, p_outs, p_scalars, p_listed, p_attended,
    p_codes, p_norms, p_fields, p_query, p_bias, p_log_scale, p_scale, p_asked, p_valid,
    sm_scale, sink, window, kv_stride, k_stride, row_stride, code_head, norm_head, capacity,
    HKV: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, MOST: tl.constexpr, TARGET: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, DP4A: tl.constexpr, SELECTOR: tl.constexpr,
    UNIFORM: tl.constexpr, SURVEYED: tl.constexpr, SIGNALS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """First round: one split a program, sink and window last; that program surveys too."""
    begin_next(DEPENDENT)
    i_row, i_split = tl.program_id(0) // (SPLITS + 1), tl.program_id(0) % (SPLITS + 1)
    await_signals(p_listed + i_row * SIGNALS + tl.minimum(i_split, SPLITS - 1), 1, DEPENDENT)
    if i_split == SPLITS:
        # Not before the last split is listed, as so many would take what `select` needs of the second-level cache.
        await_each(p_listed + i_row * SIGNALS, tl.arange(0, SIGNALS) % SPLITS, SIGNALS, DEPENDENT)
    if tl.load(p_mode + i_row) == SAMPLED:
        attend_list(
            i_row, i_split, SPLITS, p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_entries, p_counts, p_outs, p_scalars,
            sm_scale, sink, window, kv_stride, k_stride, capacity,
            HKV, G, WIDTH, D, DP, BN, SPLITS, MOST, TARGET, WIDE,
        )  # fmt: skip
        # Sink and window are soonest done. Apart, as Triton leaves out only what a constant alone rules out.
        if not UNIFORM:
            if i_split == SPLITS:
                n = tl.load(p_seq_lens + i_row // HKV).to(tl.int32)
                survey_row(
                    tl.arange(0, SURVEYED), i_row, n, p_codes, p_norms, p_fields, p_query, p_bias, p_log_scale, p_scale,
                    p_entries, p_counts, p_asked, p_valid, p_v, sm_scale, row_stride, code_head, norm_head, capacity,
                    HKV, G, D, R, GROUPS, WORDS, TARGET != DENOMINATOR, SPLITS, MOST, DP4A, SELECTOR, SURVEYED,
                )  # fmt: skip
    signal(p_attended + i_row, DEPENDENT)


@triton.jit
def place_of(index, first, borders, jumps):
    """Where the entries ``index``, counted over all lists, lie, from ``first``, where the first list begins."""
    place = first + index
    for j in tl.static_range(LISTS - 1):
        place += tl.where(index < borders[j], 0, jumps[j])
    return place


@triton.jit
def attend_list(
    i_row, i_split, splits, p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_entries, p_counts, p_outs, p_scalars,
    sm_scale, sink, window, kv_stride, k_stride, capacity,
    HKV: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, MOST: tl.constexpr, TARGET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One split: its lists, or, behind the last, sink and window."""
    b, h = i_row // HKV, i_row % HKV
    listed = i_split < splits
    n = tl.load(p_seq_lens + b).to(tl.int32)
    p_count = p_counts + i_row * MOST + LISTS * i_split
    span = capacity // (splits * LISTS)
    base = i_row.to(tl.int64) * capacity + tl.where(listed, i_split, 0) * (LISTS * span)
    # From entry borders[j] on the source is jumps[j] further: the next list, or the window behind the sink.
    p_list = p_entries + ENTRY * base
    p_pi = probabilities_of(p_list)
    # Slots of the context stand alone.
    each = tl.where(listed, ENTRY, 1)
    borders = ()
    jumps = ()
    count = 0
    for j in tl.static_range(LISTS):
        own = tl.load(p_count + j, mask=listed, other=0)
        count += own
        if j < LISTS - 1:
            borders = borders + (count,)
            jumps = jumps + (span - own,)
    if not listed:
        low, high = sampled_range(n, sink, window)
        count = low + n - high
        p_list = p_kv_indices + b.to(tl.int64) * kv_stride
        borders = (low, count, count)
        jumps = (high - low, 0, 0)

    # Rows [0, G) hold the estimate's weights w y, rows [G, 2G) its variance's w (w - 1) y^2.
    o_w = tl.arange(0, WIDTH)
    is_square = (o_w >= G) & (o_w < 2 * G)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    q = tl.load(
        p_q + (i_row * G + o_w % G)[:, None] * D + o_d[None, :], mask=(o_w < 2 * G)[:, None] & m_d[None, :], other=0.0
    )  # [WIDTH, DP]
    acc = tl.zeros([WIDTH, DP], tl.float32)
    maximum = tl.full([WIDTH], float("-inf"), tl.float32)
    mass = tl.zeros([WIDTH, BN], tl.float32)
    square = tl.zeros([WIDTH, BN], tl.float32)
    spread = tl.zeros([WIDTH, BN], tl.float32)
    o_n = tl.arange(0, BN)
    p_kh, p_vh = p_k + h * D, p_v + h * D
    # K and V of the next block are under way while this one is computed, and the slots of the one after it.
    ok = o_n < count
    slot = tl.load(p_list + each * place_of(o_n, 0, borders, jumps), mask=ok, other=0)
    ahead = o_n + BN
    upcoming = tl.load(p_list + each * place_of(ahead, 0, borders, jumps), mask=ahead < count, other=0)
    weight = 1.0 / tl.load(p_pi + ENTRY * place_of(o_n, 0, borders, jumps), mask=ok & listed, other=1.0)
    at = slot.to(tl.int64)[:, None] * k_stride + o_d[None, :]
    k = tl.load(p_kh + at, mask=ok[:, None] & m_d[None, :], other=0.0)  # [BN, DP]
    v = tl.load(p_vh + at, mask=ok[:, None] & m_d[None, :], other=0.0)
    for start in range(0, count, BN):
        index = start + BN + o_n
        next_ok = index < count
        at = upcoming.to(tl.int64)[:, None] * k_stride + o_d[None, :]
        next_k = tl.load(p_kh + at, mask=next_ok[:, None] & m_d[None, :], other=0.0)
        next_v = tl.load(p_vh + at, mask=next_ok[:, None] & m_d[None, :], other=0.0)
        p_next_pi = p_pi + ENTRY * place_of(index, 0, borders, jumps)
        next_weight = 1.0 / tl.load(p_next_pi, mask=next_ok & listed, other=1.0)
        ahead = index + BN
        upcoming = tl.load(p_list + each * place_of(ahead, 0, borders, jumps), mask=ahead < count, other=0)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (sm_scale * LOG2E)
        logits = tl.where(ok[None, :], logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        y = tl.exp2(logits - larger[:, None])
        p = tl.where(is_square[:, None], (weight * (weight - 1.0))[None, :] * y * y, weight[None, :] * y)
        alpha = tl.exp2(maximum - larger)
        alpha = tl.where(is_square, alpha * alpha, alpha)
        maximum = larger
        acc = accumulate(p, v.to(q.dtype), acc * alpha[:, None], WIDE)
        mass = mass * alpha[:, None] + p
        spread = spread * (alpha * alpha)[:, None] + p * p * (1.0 - 1.0 / weight)[None, :]
        if TARGET != DENOMINATOR:
            wide = v.to(tl.float32)
            square = square * alpha[:, None] + p * tl.sum(wide * wide, 1)[None, :]
        k, v, weight, ok = next_k, next_v, next_weight, next_ok
    i_part = i_row * (SPLITS + 1) + i_split
    p_part = p_outs + (i_part.to(tl.int64) * WIDTH + o_w[:, None]) * DP + o_d[None, :]
    tl.store(p_part, acc, mask=(o_w < 2 * G)[:, None])
    p_own = p_scalars + i_part * NUM_SCALARS * WIDTH + o_w
    tl.store(p_own + MAXIMUM * WIDTH, maximum)
    tl.store(p_own + MASS * WIDTH, tl.sum(mass, 1))
    tl.store(p_own + SPREAD * WIDTH, tl.sum(spread, 1))
    if TARGET != DENOMINATOR:
        tl.store(p_own + SQUARE * WIDTH, tl.sum(square, 1))


@triton.jit
def attend_everything(
    i_row, i_split, splits, p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_outs, p_scalars, sm_scale, kv_stride, k_stride,
    HKV: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of plain attention; what it stores of the values' norms starts the next step's scale."""
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    span = ((n + splits - 1) // splits + BN - 1) // BN * BN
    first = i_split * span
    last = tl.minimum(first + span, n)
    o_w = tl.arange(0, WIDTH)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    q = tl.load(p_q + (i_row * G + o_w)[:, None] * D + o_d[None, :], mask=(o_w < G)[:, None] & m_d[None, :], other=0.0)
    acc = tl.zeros([WIDTH, DP], tl.float32)
    maximum = tl.full([WIDTH], float("-inf"), tl.float32)
    mass = tl.zeros([WIDTH], tl.float32)
    o_n = tl.arange(0, BN)
    p_list = p_kv_indices + b.to(tl.int64) * kv_stride
    p_kh, p_vh = p_k + h * D, p_v + h * D
    for start in tl.range(first, last, BN, num_stages=STAGES):
        position = start + o_n
        ok = position < last
        slot = tl.load(p_list + position, mask=ok, other=0)
        at = slot.to(tl.int64)[:, None] * k_stride + o_d[None, :]
        mask = ok[:, None] & m_d[None, :]
        k = tl.load(p_kh + at, mask=mask, other=0.0)  # [BN, DP]
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (sm_scale * LOG2E)
        logits = tl.where(ok[None, :], logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        p = tl.exp2(logits - larger[:, None])
        alpha = tl.exp2(maximum - larger)
        maximum = larger
        v = tl.load(p_vh + at, mask=mask, other=0.0)
        acc = accumulate(p, v.to(q.dtype), acc * alpha[:, None], False)
        mass = mass * alpha + tl.sum(p, 1)
    i_part = i_row * (SPLITS + 1) + i_split
    p_part = p_outs + (i_part.to(tl.int64) * WIDTH + o_w[:, None]) * DP + o_d[None, :]
    tl.store(p_part, acc, mask=(o_w < G)[:, None])
    p_own = p_scalars + i_part * NUM_SCALARS * WIDTH + o_w
    tl.store(p_own + MAXIMUM * WIDTH, maximum)
    tl.store(p_own + MASS * WIDTH, mass)
