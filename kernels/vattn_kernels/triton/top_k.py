"""Sampler ``uniform``, first half: rank the tokens of the sampled range, and find the border of the top-k."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.reference.scores import MOST_HALF_VARIANCE
from vattn_kernels.sketch import UNUSABLE as UNUSABLE_LEVEL
from vattn_kernels.triton.estimate import HASH, ORACLE, SIGN, SKETCH, largest, row_scores, signature_scores
from vattn_kernels.triton.layout import (
    CODING,
    CUT_HEADS,
    EXHAUSTED,
    LAST_TIE,
    LISTS,
    LOG2E,
    NUM_PLANS,
    NUM_SCALES,
    REPEATS,
    RUN,
    SAMPLE_SIZE,
    SAMPLED,
    SPLIT_BORDER,
    THRESHOLD,
    TOP_K,
    UNIT,
)
from vattn_kernels.triton.select import load_queries, load_side, offsets_of_block, score_codes

UNUSABLE = tl.constexpr(UNUSABLE_LEVEL)
# Octaves of half a variance beyond which a code says nothing of its token.
MOST_CODING = tl.constexpr(MOST_HALF_VARIANCE * LOG2E.value)
# A share of tokens is a float32 here, and one that comes out whole must stay so.
WHOLE = tl.constexpr(2.0**-22)
# Tokens that one program looks at together, and the digits by which it finds a rank.
CHUNK = tl.constexpr(1024)
DIGITS = tl.constexpr(256)
DIGIT_BITS = tl.constexpr(8)


@triton.jit(do_not_specialize=["sink"])
def rank_fwd_kernel(
    p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields, p_mode, p_query, p_bias, p_log_scale, p_scale, p_ranks,
    p_valid, p_v, sink, window, sm_scale, kv_stride, code_head, norm_head, row_stride, capacity,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    SPLITS: tl.constexpr, DP4A: tl.constexpr, SELECTOR: tl.constexpr,
):  # fmt: skip
    """Store each token's score as an unsigned number of the same order: 0 where side data do not belong to the key.

    The score is the largest of the group's, by estimated weights over the masses that the last step found.
    """
    block: tl.constexpr = REPEATS * LISTS * RUN
    i_row, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if tl.load(p_mode + i_row) != SAMPLED:
        return
    b, h = i_row // HKV, i_row % HKV
    high = tl.load(p_seq_lens + b).to(tl.int32) - window
    p_rows = p_codes + h.to(tl.int64) * code_head
    p_indices = p_kv_indices + b.to(tl.int64) * kv_stride
    p_own_ranks = p_ranks + i_row.to(tl.int64) * capacity
    o_b = offsets_of_block()
    if SELECTOR == SKETCH:
        p_own = p_scale + i_row * NUM_SCALES
        unit, coding = tl.load(p_own + UNIT), tl.load(p_own + CODING)
        shifts, masks, _, levels, queries = load_queries(
            p_fields, p_query, p_bias, p_log_scale, i_row, h, unit, G, R, GROUPS
        )
    for start in range(sink + i_split * block, high, SPLITS * block):
        position = start + o_b
        m_b = position < high
        slot = tl.load(p_indices + position, mask=m_b, other=0)
        if SELECTOR == SKETCH:
            low_pair, high_pair, norm = load_side(p_rows, p_norms + h.to(tl.int64) * norm_head, slot, WORDS)
            best, missed = score_codes(
                low_pair, high_pair, norm, shifts, masks, levels, queries, unit * LOG2E, coding, G, GROUPS, WORDS, DP4A
            )
            score = tl.where(missed <= MOST_CODING, best + missed, float("-inf"))
            known = (norm.to(tl.int32) & 0xFF) != UNUSABLE
        elif (SELECTOR == SIGN) | (SELECTOR == HASH):
            scores = signature_scores(
                slot, p_rows, p_norms + h.to(tl.int64) * norm_head, p_query, p_bias, p_log_scale, i_row, row_stride,
                G, D, WORDS, GROUPS, SELECTOR, DP4A,
            )  # fmt: skip
            score = largest(scores, G)
        else:
            score = row_scores(
                start, high, p_rows, p_v + h * D, p_indices, p_query, p_bias, p_log_scale, i_row, sm_scale, row_stride,
                G, D, SELECTOR, False,
            )  # fmt: skip
        if SELECTOR == ORACLE:
            known = m_b
        elif SELECTOR != SKETCH:
            known = tl.load(p_valid + slot) != 0
        bits = score.to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
        tl.store(p_own_ranks + position - sink, tl.where(known, order, 0), mask=m_b)


@triton.jit
def ranks_at(p_ranks, index, mask):
    """Ranks as unsigned numbers."""
    return tl.load(p_ranks + index, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def splits_of_members(top_k, size, span, SPLITS: tl.constexpr):
    """Splits that attend to the top-k, the others to the sample: by their lengths; -1 where they do not hold both."""
    each = span * LISTS
    least = (top_k + each - 1) // each
    most = SPLITS - (size + each - 1) // each
    fair = (SPLITS * top_k.to(tl.float32) / (top_k + size).to(tl.float32) + 0.5).to(tl.int32)
    return tl.where(least > most, -1, tl.minimum(tl.maximum(fair, least), most))


@triton.jit(do_not_specialize=["sink", "top_k_count", "pilot_min"])
def top_k_fwd_kernel(
    p_seq_lens, p_mode, p_ranks, p_plan,
    sink, window, top_k_count, top_k_share, pilot, pilot_min, capacity,
    HKV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Plan of one row: size and border of its top-k, the first of those that tie, and the size of the pilot.

    The border is found a digit at a time, by how many ranks have each.
    """
    i_row = tl.program_id(0)
    if tl.load(p_mode + i_row) != SAMPLED:
        return
    total = tl.load(p_seq_lens + i_row // HKV).to(tl.int32) - window - sink
    share = tl.ceil(top_k_share * total.to(tl.float32) * (1.0 - WHOLE)).to(tl.int32)
    top_k = tl.minimum(tl.where(top_k_count >= 0, top_k_count, share), total)
    first = tl.maximum(tl.ceil(pilot * total.to(tl.float32) * (1.0 - WHOLE)).to(tl.int32), pilot_min)
    size = tl.minimum(first, total - top_k)
    border = splits_of_members(top_k, size, capacity // (SPLITS * LISTS), SPLITS)
    tl.store(p_plan + i_row * NUM_PLANS + TOP_K, top_k)
    if (size == 0) | (border < 0):
        tl.store(p_mode + i_row, EXHAUSTED)
        return
    p_own = p_ranks + i_row.to(tl.int64) * capacity
    o_n = tl.arange(0, CHUNK)
    o_d = tl.arange(0, DIGITS)
    threshold = (top_k * 0).to(tl.uint32)
    left = top_k
    for i_digit in tl.static_range(32 // DIGIT_BITS):
        shift = 32 - DIGIT_BITS * (i_digit + 1)
        counts = tl.zeros([DIGITS], tl.int32)
        for start in range(0, total, CHUNK):
            rank = ranks_at(p_own, start + o_n, start + o_n < total)
            inside = start + o_n < total
            if i_digit > 0:
                inside = inside & ((rank >> (shift + DIGIT_BITS)) == threshold)
            digit = ((rank >> shift) & (DIGITS - 1)).to(tl.int32)
            counts += tl.histogram(digit, DIGITS, mask=inside)
        at_least = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.sum((at_least >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(o_d == chosen + 1, at_least, 0), 0)
        threshold = (threshold << DIGIT_BITS) | chosen.to(tl.uint32)
    # Of those that tie at the border the first are taken.
    last_tie = top_k * 0 - 1
    tied = 0
    for start in range(0, total, CHUNK):
        inside = start + o_n < total
        equal = (inside & (ranks_at(p_own, start + o_n, inside) == threshold)).to(tl.int32)
        so_far = tied + tl.cumsum(equal, 0)
        taken = (equal > 0) & (so_far <= left)
        last_tie = tl.maximum(last_tie, tl.max(tl.where(taken, start + o_n, -1), 0))
        tied += tl.sum(equal, 0)
    p_row = p_plan + i_row * NUM_PLANS
    tl.store(p_row + THRESHOLD, threshold.to(tl.int32, bitcast=True))
    tl.store(p_row + LAST_TIE, last_tie)
    tl.store(p_row + SAMPLE_SIZE, size)
    tl.store(p_row + SPLIT_BORDER, border)
    tl.store(p_row + CUT_HEADS, 0)
