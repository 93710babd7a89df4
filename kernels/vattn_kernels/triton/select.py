"""Stage ``select``: score the codes of the sampled range, draw tokens and compact them into lists."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.sketch import GROUPS_PER_WORD, NORM_STEPS_PER_OCTAVE, NORM_ZERO
from vattn_kernels.triton.estimate import HASH, ORACLE, SIGN, SKETCH, largest, row_scores, signature_scores
from vattn_kernels.triton.layout import (
    CODE_BITS,
    CODING,
    DENOMINATOR,
    FLOOR,
    LISTS,
    LOG2E,
    NUM_SCALES,
    REPEATS,
    RUN,
    SAMPLED,
    UNIT,
    await_last,
    begin_next,
    signal,
    store_entries,
)

# Octaves of a norm: so many a level of its byte, and those of level 0.
OCTAVES = tl.constexpr(1 / NORM_STEPS_PER_OCTAVE)
LEAST_OCTAVES = tl.constexpr(-NORM_ZERO / NORM_STEPS_PER_OCTAVE)
GOLDEN = tl.constexpr(0x9E3779B1)
INCREMENT = tl.constexpr(0x7F4A7C15)
LANES = tl.constexpr(0x01010101)
# Groups of a word that may lie below the upper ends of their bytes, see `vattn_kernels.sketch.SketchTables`.
LOWER_GROUPS = tl.constexpr(GROUPS_PER_WORD - 1)
# Steps of an octave that a level is rounded to: float32 holds it beside the 2^12 octaves that `select_gluon` adds.
LEVEL_STEPS = tl.constexpr(1 << 11)
# Of the upper 23 bits of a random word, which fill a float32's fraction.
RANDOM_UNIT = tl.constexpr(2.0**-23)


@triton.jit
def scramble(x):
    """`mix` up to its last step, `vattn_kernels.reference.rng.scramble`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    return x * 0x846CA68B


@triton.jit
def mix(x):
    """Two-multiply 32-bit hash, `vattn_kernels.reference.rng.mix`."""
    x = scramble(x)
    return x ^ (x >> 16)


@triton.jit
def absorb(x, part):
    """One step of `vattn_kernels.reference.rng.stream_key`."""
    return mix((x ^ (part * GOLDEN)) + INCREMENT)


@triton.jit
def key_of(seed, layer, h, n):
    """Key of the random numbers of one head and step."""
    return absorb(absorb(absorb(seed.to(tl.uint32), layer.to(tl.uint32)), h.to(tl.uint32)), n.to(tl.uint32))


@triton.jit
def uniform(index, key):
    """Number in [0, 1) of an index, `vattn_kernels.reference.rng.uniform`."""
    return (scramble(index.to(tl.uint32) * GOLDEN + key) >> 9).to(tl.float32) * RANDOM_UNIT


@triton.jit
def load_fields(p_fields, h, R: tl.constexpr, GROUPS: tl.constexpr):
    """Shift to the left that brings a group's codes to the upper ends of their bytes, and their mask there."""
    shifts = ()
    masks = ()
    for j in tl.static_range(GROUPS):
        p_field = p_fields + (h * R + 4 * j) * 3
        width = tl.load(p_field + 2)
        below = -width + CODE_BITS
        shifts = shifts + (below - tl.load(p_field + 1),)
        masks = masks + ((((1 << width) - 1) * LANES) << below,)
    return shifts, masks


@triton.jit
def is_shifted(j: tl.constexpr, WORDS: tl.constexpr):
    """Whether a group's codes have to be brought to the upper ends of their bytes."""
    return j < LOWER_GROUPS * WORDS


@triton.jit
def dot_bytes(codes, query, acc, DP4A: tl.constexpr):
    """``acc`` plus the products of four unsigned codes and four signed weights, byte by byte."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, query, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        weight = (query << (24 - 8 * byte)) >> 24
        acc += ((codes >> (8 * byte)) & 0xFF) * weight
    return acc


# A sink known to be aligned makes the compiler give each thread four neighbours, and then move them for the stores.
@triton.jit(do_not_specialize=["seed", "layer", "sink"])
def select_fwd_kernel(
    p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
    p_mode, p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads, p_listed,
    sink, window, seed, layer, kv_stride, code_head, norm_head, capacity, p_valid, p_v, sm_scale, row_stride,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    TARGET: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr, SELECTOR: tl.constexpr,
    SIGNALS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """First round: one split a program."""
    await_last(DEPENDENT)
    begin_next(DEPENDENT)
    i_row, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if tl.load(p_mode + i_row) == SAMPLED:
        select_split(
            i_row, i_split, SPLITS, p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
            p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
            sink, window, seed, layer, kv_stride, code_head, norm_head, capacity, p_valid, p_v, sm_scale, row_stride,
            HKV, G, D, R, GROUPS, WORDS, TARGET != DENOMINATOR, MOST, DP4A, SELECTOR,
        )  # fmt: skip
    signal(p_listed + i_row * SIGNALS + i_split, DEPENDENT)


@triton.jit
def power_of_two(x, FAST: tl.constexpr):
    """``2^x``; the fast form flushes results below 2^-126 to 0."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def load_side(p_codes, p_norms, slot, WORDS: tl.constexpr):
    """Words of the codes in pairs, and the two norms as one number; slots of one head lie side by side."""
    p_code = p_codes + slot * WORDS
    if WORDS == 1:
        low = tl.load(p_code).to(tl.int64)
    else:
        low = tl.load(p_code.to(tl.pointer_type(tl.int64)))
    high = low
    if WORDS == 4:
        high = tl.load((p_code + 2).to(tl.pointer_type(tl.int64)))
    return low, high, tl.load((p_norms + slot * 2).to(tl.pointer_type(tl.int16)))


@triton.jit
def load_queries(
    p_fields, p_query, p_bias, p_log_scale, i_row, h, unit, G: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Shifts and masks of codes, the first head's level in octaves, all heads' in units and weights, four a word."""
    shifts, masks = load_fields(p_fields, h, R, GROUPS)
    levels = ()
    queries = ()
    for g in tl.static_range(G):
        head = i_row * G + g
        levels = levels + (load_level(p_bias, p_log_scale, head, unit),)
        for j in tl.static_range(GROUPS):
            queries = queries + (tl.load((p_query + (head * GROUPS + j) * 4).to(tl.pointer_type(tl.int32))),)
    return shifts, masks, octaves_of(levels[0], unit), levels, queries


@triton.jit
def load_level(p_bias, p_log_scale, head, unit):
    """What a head's score starts from, in units."""
    level = (tl.load(p_bias + head) + tl.load(p_log_scale + head)) / unit
    return tl.floor(tl.minimum(tl.maximum(level, -1.0e9), 1.0e9) + 0.5).to(tl.int32)


@triton.jit
def octaves_of(level, unit):
    """Octaves of a level, to 1 / `LEVEL_STEPS`."""
    octaves = unit * LOG2E * level.to(tl.float32)
    return tl.floor(octaves * LEVEL_STEPS + 0.5) * (1.0 / LEVEL_STEPS)


@triton.jit
def products(
    low_pair, high_pair, shifts, masks, levels, queries,
    G: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Each head's score of a token in units, without what half the variance missed adds."""
    words = (low_pair.to(tl.int32),)
    if WORDS > 1:
        words = words + ((low_pair >> 32).to(tl.int32),)
    if WORDS == 4:
        words = words + (high_pair.to(tl.int32), (high_pair >> 32).to(tl.int32))
    accs = levels
    for j in tl.static_range(GROUPS):
        lanes = words[j % WORDS]
        if is_shifted(j, WORDS):
            lanes = lanes << shifts[j]
        lanes = lanes & masks[j]
        grown = ()
        for g in tl.static_range(G):
            grown = grown + (dot_bytes(lanes, queries[g * GROUPS + j], accs[g], DP4A),)
        accs = grown
    return accs


@triton.jit
def score_codes(
    low_pair, high_pair, norm, shifts, masks, levels, queries, unit2, coding,
    G: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Octaves of the group's largest score beyond the first head's level, and what half the variance missed adds."""
    accs = products(low_pair, high_pair, shifts, masks, levels, queries, G, GROUPS, WORDS, DP4A)
    best = largest(accs, G)
    return unit2 * (best - levels[0]).to(tl.float32), octaves_missed(norm, coding, DP4A)


@triton.jit
def octaves_missed(norm, coding, DP4A: tl.constexpr):
    """What half the variance missed adds to a score; an error byte of 255, of no usable side data, makes it certain."""
    error2 = power_of_two((norm.to(tl.int32) & 0xFF).to(tl.float32) * (2 * OCTAVES) + 2 * LEAST_OCTAVES, DP4A)
    return coding * error2


@triton.jit
def octaves_beside(missed, norm, base, WITH_VALUES: tl.constexpr):
    """Octaves of a score beside those of its product: what is missed, the value's norm and the first head's level."""
    # Added up in the order of `select_gluon`, so that both round alike.
    if WITH_VALUES:
        missed += ((norm.to(tl.int32) >> 8) & 0xFF).to(tl.float32) * OCTAVES + (LEAST_OCTAVES + base)
    else:
        missed += base
    return missed


@triton.jit
def octaves_of_heads(
    low_pair, high_pair, norm, shifts, masks, base, levels, queries, unit2, coding,
    G: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, WITH_VALUES: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Octaves of each head's scaled score."""
    accs = products(low_pair, high_pair, shifts, masks, levels, queries, G, GROUPS, WORDS, DP4A)
    beside = octaves_beside(octaves_missed(norm, coding, DP4A), norm, base, WITH_VALUES)
    octaves = ()
    for g in tl.static_range(G):
        octaves = octaves + (unit2 * (accs[g] - levels[0]).to(tl.float32) + beside,)
    return octaves


@triton.jit
def places(chosen):
    """Rank of each chosen token among those of its list, and the number of each list.

    The lanes of a warp hold a list's tokens, `REPEATS` runs of `RUN`: one scan ranks all of them, a byte each. Loads
    that gather put their first axis on the lanes, scans their last: hence the transpositions, which move nothing.

    Parameters
    ----------
    chosen : tensor
        bool ``[RUN, LISTS, REPEATS]``.
    """
    tl.static_assert((REPEATS == 4) & (RUN <= 32), "four bytes, each of which counts up to 255")
    shift = 8 * tl.arange(0, REPEATS)[None, None, :]
    packed = tl.sum(chosen.to(tl.int32) << shift, 2)  # [RUN, LISTS]
    before = tl.trans(tl.cumsum(tl.trans(packed), 1)) - packed
    totals = tl.sum(packed, 0)  # [LISTS]
    # Byte j of the product is the sum of the bytes below j.
    earlier = (totals * 0x01010100)[None, :, None]
    ranks = ((before[:, :, None] >> shift) & 0xFF) + ((earlier >> shift) & 0xFF)
    return ranks, ((totals * LANES) >> 24) & 0xFF


@triton.jit
def offsets_of_block():
    """Tokens of a block ``[RUN, LISTS, REPEATS]``, counted from its first."""
    return (
        tl.arange(0, RUN)[:, None, None]
        + (tl.arange(0, LISTS) * RUN)[None, :, None]
        + (tl.arange(0, REPEATS) * (LISTS * RUN))[None, None, :]
    )


@triton.jit
def append(chosen, at, slot, pi, p_entries):
    """Store the chosen tokens behind the ends ``at`` of their lists; how many each list gains."""
    ranks, hits = places(chosen)
    place = at[None, :, None] + ranks
    store_entries(p_entries, place, slot, pi, chosen)
    return hits


@triton.jit
def store_lengths(o_own, counts, reads, p_counts, p_reads):
    """Store the length of each list, and the expected one."""
    tl.store(p_counts + o_own, counts.to(tl.int32))
    tl.store(p_reads + o_own, tl.sum(tl.sum(reads, 2), 0))


@triton.jit
def select_split(
    i_row, i_split, splits, p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
    p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
    sink, window, seed, layer, kv_stride, code_head, norm_head, capacity, p_valid, p_v, sm_scale, row_stride,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WITH_VALUES: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr, SELECTOR: tl.constexpr,
):  # fmt: skip
    """List one split of one row: every ``splits``-th block of its tokens, a list for each warp."""
    if SELECTOR == SKETCH:
        select_by_sketch(
            i_row, i_split, splits, p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
            p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
            sink, window, seed, layer, kv_stride, code_head, norm_head, capacity,
            HKV, G, R, GROUPS, WORDS, WITH_VALUES, MOST, DP4A,
        )  # fmt: skip
    else:
        select_by_estimate(
            i_row, i_split, splits, p_codes, p_norms, p_kv_indices, p_seq_lens,
            p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
            sink, window, seed, layer, kv_stride, code_head, norm_head, capacity, p_valid, p_v, sm_scale, row_stride,
            HKV, G, D, GROUPS, WORDS, WITH_VALUES, MOST, DP4A, SELECTOR,
        )  # fmt: skip


@triton.jit
def select_by_estimate(
    i_row, i_split, splits, p_codes, p_norms, p_kv_indices, p_seq_lens,
    p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
    sink, window, seed, layer, kv_stride, code_head, norm_head, capacity, p_valid, p_v, sm_scale, row_stride,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WITH_VALUES: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr, SELECTOR: tl.constexpr,
):  # fmt: skip
    """`select_split` by the scores of `estimate`; a slot without usable side data is read for certain."""
    block: tl.constexpr = REPEATS * LISTS * RUN
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    high = n - window
    key = key_of(seed, layer, h, n)
    least = tl.load(p_scale + i_row * NUM_SCALES + FLOOR)
    p_rows = p_codes + h.to(tl.int64) * code_head
    p_indices = p_kv_indices + b.to(tl.int64) * kv_stride
    span = capacity // (splits * LISTS)
    o_list = tl.arange(0, LISTS)
    first = i_row.to(tl.int64) * capacity + (i_split * LISTS + o_list) * span  # [LISTS]
    o_b = offsets_of_block()
    reads = tl.zeros([RUN, LISTS, REPEATS], tl.float32)
    at = first
    for start in range(sink + i_split * block, high, splits * block):
        position = start + o_b
        m_b = position < high
        slot = tl.load(p_indices + position, mask=m_b, other=0)
        if (SELECTOR == SIGN) | (SELECTOR == HASH):
            scores = signature_scores(
                slot, p_rows, p_norms + h.to(tl.int64) * norm_head, p_query, p_bias, p_log_scale, i_row, row_stride,
                G, D, WORDS, GROUPS, SELECTOR, DP4A,
            )  # fmt: skip
            score = largest(scores, G)
        else:
            score = row_scores(
                start, high, p_rows, p_v + h * D, p_indices, p_query, p_bias, p_log_scale, i_row, sm_scale, row_stride,
                G, D, SELECTOR, WITH_VALUES,
            )  # fmt: skip
        pi = tl.minimum(power_of_two(tl.minimum(score * LOG2E, 0.0), DP4A) + least, 1.0)
        if SELECTOR != ORACLE:
            pi = tl.where(tl.load(p_valid + slot) == 0, 1.0, pi)
        reads += tl.where(m_b, pi, 0.0)
        at += append(m_b & (uniform(position, key) < pi), at, slot, pi, p_entries)
    store_lengths(i_row * MOST + i_split * LISTS + o_list, at - first, reads, p_counts, p_reads)


@triton.jit
def select_by_sketch(
    i_row, i_split, splits, p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
    p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads,
    sink, window, seed, layer, kv_stride, code_head, norm_head, capacity,
    HKV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WITH_VALUES: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """`select_split` by the codes of sketches."""
    block: tl.constexpr = REPEATS * LISTS * RUN
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    high = n - window
    key = key_of(seed, layer, h, n)
    p_own = p_scale + i_row * NUM_SCALES
    unit, coding, least = tl.load(p_own + UNIT), tl.load(p_own + CODING), tl.load(p_own + FLOOR)
    unit2 = unit * LOG2E
    # What is constant over tokens is loaded here: the stores below keep the compiler from moving loads out of the loop.
    shifts, masks, base, levels, queries = load_queries(
        p_fields, p_query, p_bias, p_log_scale, i_row, h, unit, G, R, GROUPS
    )

    p_code_head, p_norm_head = p_codes + h.to(tl.int64) * code_head, p_norms + h.to(tl.int64) * norm_head
    p_indices = p_kv_indices + b.to(tl.int64) * kv_stride
    span = capacity // (splits * LISTS)
    o_list = tl.arange(0, LISTS)
    at = i_row.to(tl.int64) * capacity + (i_split * LISTS + o_list) * span  # [LISTS]
    o_b = offsets_of_block()
    reads = tl.zeros([RUN, LISTS, REPEATS], tl.float32)
    begin = sink + i_split * block
    stride = splits * block
    # The next block's codes are under way while this one is scored, and the slots of the one after it.
    position = begin + o_b
    slot = tl.load(p_indices + position, mask=position < high, other=0)
    upcoming = tl.load(p_indices + position + stride, mask=position + stride < high, other=0)
    low_pair, high_pair, norm = load_side(p_code_head, p_norm_head, slot, WORDS)
    first = at
    for start in range(begin, high, stride):
        position = start + o_b
        # Behind the end slot 0 is read and not chosen.
        next_low, next_high, next_norm = load_side(p_code_head, p_norm_head, upcoming, WORDS)
        next_slot = upcoming
        ahead = position + 2 * stride
        upcoming = tl.load(p_indices + ahead, mask=ahead < high, other=0)
        best, missed = score_codes(
            low_pair, high_pair, norm, shifts, masks, levels, queries, unit2, coding, G, GROUPS, WORDS, DP4A
        )
        log_pi = best + octaves_beside(missed, norm, base, WITH_VALUES)
        pi = tl.minimum(power_of_two(tl.minimum(log_pi, 0.0), DP4A) + least, 1.0)
        m_b = position < high
        reads += tl.where(m_b, pi, 0.0)
        at += append(m_b & (uniform(position, key) < pi), at, slot, pi, p_entries)
        slot, low_pair, high_pair, norm = next_slot, next_low, next_high, next_norm
    store_lengths(i_row * MOST + i_split * LISTS + o_list, at - first, reads, p_counts, p_reads)
