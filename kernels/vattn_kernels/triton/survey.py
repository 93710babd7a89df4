"""Part of ``attend``: the share of a group's reads that each of its heads asks for, from a few of the tokens listed.

A group reads a token by the largest of its heads' scores. A head whose scores all lie below the others' asks for next
to none: what it attends to may be what codes miss, and no half-width tells, as that knows only what was read.
``combine`` raises its scale, `vattn_kernels.triton.combine.settle_group`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.estimate import HASH, ORACLE, SIGN, SKETCH, scores_of_slots, signature_scores
from vattn_kernels.triton.layout import CODING, ENTRY, LISTS, LOG2E, NUM_SCALES, UNIT, probabilities_of
from vattn_kernels.triton.select import load_queries, load_side, octaves_of_heads, power_of_two, uniform


@triton.jit
def survey_row(
    o_n, i_row, n, p_codes, p_norms, p_fields, p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_asked,
    p_valid, p_v, sm_scale, row_stride, code_head, norm_head, capacity,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WITH_VALUES: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr, SELECTOR: tl.constexpr,
    SURVEYED: tl.constexpr,
):  # fmt: skip
    """Store the mean of ``min(1, c_h s_hi) / pi_i`` over listed tokens for each head of a row whose lists are complete.

    A token is listed with probability ``pi_i``, so this estimates ``sum_i min(1, c_h s_hi) / sum_i pi_i``, and no term
    exceeds 1. Lists are taken in turn, or by chance where there are more than ``SURVEYED``, and an entry of each by
    chance; a list stands for as many tokens as it holds.

    Parameters
    ----------
    o_n : tensor
        int32 ``[SURVEYED]``, 0, 1 and so on, in the layout to compute in.
    n : scalar
        Context, which the entries change with.
    """
    h = i_row % HKV
    i_list = o_n * (SPLITS * LISTS) // SURVEYED
    if SPLITS * LISTS > SURVEYED:
        each: tl.constexpr = SPLITS * LISTS // SURVEYED
        i_list += (uniform(o_n + SURVEYED, n.to(tl.uint32)) * each).to(tl.int32)
    count = tl.load(p_counts + i_row * MOST + i_list)
    place = tl.minimum((uniform(o_n, n.to(tl.uint32)) * count.to(tl.float32)).to(tl.int32), count - 1)
    is_there = count > 0
    at = i_row.to(tl.int64) * capacity + (i_list * (capacity // (SPLITS * LISTS)) + place)
    slot = tl.load(p_entries + ENTRY * at, mask=is_there, other=0)
    pi = tl.load(probabilities_of(p_entries) + ENTRY * at, mask=is_there, other=1.0)
    if SELECTOR == SKETCH:
        p_own = p_scale + i_row * NUM_SCALES
        unit, coding = tl.load(p_own + UNIT), tl.load(p_own + CODING)
        shifts, masks, base, levels, queries = load_queries(
            p_fields, p_query, p_bias, p_log_scale, i_row, h, unit, G, R, GROUPS
        )
        low_pair, high_pair, norm = load_side(
            p_codes + h.to(tl.int64) * code_head, p_norms + h.to(tl.int64) * norm_head, slot, WORDS
        )
        scores = octaves_of_heads(
            low_pair, high_pair, norm, shifts, masks, base, levels, queries, unit * LOG2E, coding,
            G, GROUPS, WORDS, WITH_VALUES, DP4A,
        )  # fmt: skip
    elif (SELECTOR == SIGN) | (SELECTOR == HASH):
        scores = signature_scores(
            slot, p_codes + h.to(tl.int64) * code_head, p_norms + h.to(tl.int64) * norm_head, p_query, p_bias,
            p_log_scale, i_row, row_stride, G, D, WORDS, GROUPS, SELECTOR, DP4A,
        )  # fmt: skip
    else:
        scores = scores_of_slots(
            slot, p_codes + h.to(tl.int64) * code_head, p_v + h * D, p_query, p_bias, p_log_scale, i_row, sm_scale,
            row_stride, G, D, SELECTOR, WITH_VALUES,
        )  # fmt: skip
    is_known = is_there
    if (SELECTOR != SKETCH) & (SELECTOR != ORACLE):
        is_known = tl.load(p_valid + slot) != 0
    tokens = count.to(tl.float32)
    total = tl.sum(tokens, 0)
    for g in tl.static_range(G):
        octaves = scores[g] if SELECTOR == SKETCH else scores[g] * LOG2E
        own = tl.where(is_known, power_of_two(tl.minimum(octaves, 0.0), DP4A), 1.0)
        asked = tl.sum(tokens * own / pi, 0)
        # Where nothing is listed nothing is known.
        tl.store(p_asked + i_row * G + g, tl.where(total > 0.0, asked / tl.maximum(total, 1.0), 1.0))
