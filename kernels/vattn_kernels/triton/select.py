"""Stage ``select``: score the codes of the sampled range, draw tokens and compact them into lists."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.layout import CODING, FLOOR, NUM_SCALES, SAMPLED, UNIT, nothing_to_do

LOG2E = tl.constexpr(1.4426950408889634)
GOLDEN = tl.constexpr(0x9E3779B1)
INCREMENT = tl.constexpr(0x7F4A7C15)
LANES = tl.constexpr(0x01010101)


@triton.jit
def mix(x):
    """Two-multiply 32-bit hash, `vattn_kernels.reference.rng.mix`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def absorb(x, part):
    """One step of `vattn_kernels.reference.rng.stream_key`."""
    return mix((x ^ (part * GOLDEN)) + INCREMENT)


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


@triton.jit(do_not_specialize=["seed", "layer"])
def select_fwd_kernel(
    p_codes, p_norms, p_valid, p_kv_indices, p_seq_lens, p_fields,
    p_mode, p_query, p_bias, p_log_scale, p_scale, p_slots, p_weights, p_counts, p_reads,
    sink, window, seed, layer, rows, kv_stride, code_slot, code_head, norm_slot, norm_head, capacity,
    HKV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WITH_VALUES: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr,
    RETRY: tl.constexpr, ROWS_P: tl.constexpr,
):  # fmt: skip
    # One item a program, or, in a retry that finds work, a few.
    item = tl.program_id(0)
    if RETRY:
        if nothing_to_do(p_mode, rows, SAMPLED, ROWS_P):
            return
        while item < rows * SEGMENTS:
            select_segment(
                item, p_codes, p_norms, p_valid, p_kv_indices, p_seq_lens, p_fields, p_mode,
                p_query, p_bias, p_log_scale, p_scale, p_slots, p_weights, p_counts, p_reads,
                sink, window, seed, layer, kv_stride, code_slot, code_head, norm_slot, norm_head, capacity,
                HKV, G, R, GROUPS, WORDS, WITH_VALUES, SEGMENTS, BLOCK, MOST, DP4A,
            )  # fmt: skip
            item += tl.num_programs(0)
    else:
        select_segment(
            item, p_codes, p_norms, p_valid, p_kv_indices, p_seq_lens, p_fields, p_mode,
            p_query, p_bias, p_log_scale, p_scale, p_slots, p_weights, p_counts, p_reads,
            sink, window, seed, layer, kv_stride, code_slot, code_head, norm_slot, norm_head, capacity,
            HKV, G, R, GROUPS, WORDS, WITH_VALUES, SEGMENTS, BLOCK, MOST, DP4A,
        )  # fmt: skip


@triton.jit
def load_side(p_codes, p_norms, p_valid, slot, mask, code_slot, norm_slot, WORDS: tl.constexpr):
    """Words of the codes in pairs, the two norms as one number, and whether they are usable."""
    slot = slot.to(tl.int64)
    p_code = p_codes + slot * code_slot
    if WORDS == 1:
        low = tl.load(p_code, mask=mask, other=0).to(tl.int64)
    else:
        low = tl.load(p_code.to(tl.pointer_type(tl.int64)), mask=mask, other=0)
    high = low
    if WORDS == 4:
        high = tl.load((p_code + 2).to(tl.pointer_type(tl.int64)), mask=mask, other=0)
    norm = tl.load((p_norms + slot * norm_slot).to(tl.pointer_type(tl.int16)), mask=mask, other=0)
    return low, high, norm, tl.load(p_valid + slot, mask=mask, other=1)


@triton.jit
def select_segment(
    item, p_codes, p_norms, p_valid, p_kv_indices, p_seq_lens, p_fields, p_mode,
    p_query, p_bias, p_log_scale, p_scale, p_slots, p_weights, p_counts, p_reads,
    sink, window, seed, layer, kv_stride, code_slot, code_head, norm_slot, norm_head, capacity,
    HKV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WITH_VALUES: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """List one segment of one row."""
    i_row, i_segment = item // SEGMENTS, item % SEGMENTS
    if tl.load(p_mode + i_row) != SAMPLED:
        return
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    high = n - window
    key = absorb(absorb(absorb(seed.to(tl.uint32), layer.to(tl.uint32)), h.to(tl.uint32)), n.to(tl.uint32))
    p_own = p_scale + i_row * NUM_SCALES
    unit, coding, least = tl.load(p_own + UNIT), tl.load(p_own + CODING), tl.load(p_own + FLOOR)
    unit2 = unit * LOG2E
    # What is constant over tokens is loaded here: the stores below keep the compiler from moving a load out of the loop.
    words = ()
    shifts = ()
    masks = ()
    for j in tl.static_range(GROUPS):
        p_field = p_fields + (h * R + 4 * j) * 3
        words = words + (tl.load(p_field),)
        shifts = shifts + (tl.load(p_field + 1),)
        masks = masks + (((1 << tl.load(p_field + 2)) - 1) * LANES,)
    levels = ()
    queries = ()
    for g in tl.static_range(G):
        head = i_row * G + g
        level = (tl.load(p_bias + head) + tl.load(p_log_scale + head)) / unit
        levels = levels + (tl.floor(tl.minimum(tl.maximum(level, -1.0e9), 1.0e9) + 0.5).to(tl.int32),)
        for j in tl.static_range(GROUPS):
            queries = queries + (tl.load((p_query + (head * GROUPS + j) * 4).to(tl.pointer_type(tl.int32))),)

    p_code_head, p_norm_head = p_codes + h * code_head, p_norms + h * norm_head
    p_indices = p_kv_indices + b.to(tl.int64) * kv_stride
    base = i_row.to(tl.int64) * capacity + i_segment * (capacity // SEGMENTS)
    o_b = tl.arange(0, BLOCK)
    count = 0
    reads = tl.zeros([BLOCK], tl.float32)
    begin = sink + i_segment * BLOCK
    stride = SEGMENTS * BLOCK
    # The next block's codes are under way while this one is scored, and the slots of the one after it.
    position = begin + o_b
    slot = tl.load(p_indices + position, mask=position < high, other=0)
    upcoming = tl.load(p_indices + position + stride, mask=position + stride < high, other=0)
    low_pair, high_pair, norm, usable = load_side(
        p_code_head, p_norm_head, p_valid, slot, position < high, code_slot, norm_slot, WORDS
    )
    for start in range(begin, high, stride):
        position = start + o_b
        m_b = position < high
        m_next = position + stride < high
        next_low, next_high, next_norm, next_usable = load_side(
            p_code_head, p_norm_head, p_valid, upcoming, m_next, code_slot, norm_slot, WORDS
        )
        next_slot = upcoming
        ahead = position + 2 * stride
        upcoming = tl.load(p_indices + ahead, mask=ahead < high, other=0)
        word0, word1 = low_pair.to(tl.int32), (low_pair >> 32).to(tl.int32)
        word2, word3 = high_pair.to(tl.int32), (high_pair >> 32).to(tl.int32)
        accs = ()
        for g in tl.static_range(G):
            accs = accs + (tl.zeros([BLOCK], tl.int32) + levels[g],)
        for j in tl.static_range(GROUPS):
            if WORDS == 4:
                low_half = tl.where(words[j] == 0, word0, word1)
                word = tl.where(words[j] < 2, low_half, tl.where(words[j] == 2, word2, word3))
            else:
                word = tl.where(words[j] == 0, word0, word1)
            lanes = (word >> shifts[j]) & masks[j]
            grown = ()
            for g in tl.static_range(G):
                grown = grown + (dot_bytes(lanes, queries[g * GROUPS + j], accs[g], DP4A),)
            accs = grown
        best = accs[0]
        for g in tl.static_range(1, G):
            best = tl.maximum(best, accs[g])
        norm_bits = norm.to(tl.int32)
        log_pi = unit2 * best.to(tl.float32) + coding * tl.exp2(((norm_bits & 0xFF) - 128).to(tl.float32) * 0.25)
        if WITH_VALUES:
            log_pi += (((norm_bits >> 8) & 0xFF) - 128).to(tl.float32) * 0.125
        pi = tl.minimum(tl.exp2(tl.minimum(log_pi, 0.0)) + least, 1.0)
        pi = tl.where(usable != 0, pi, 1.0)
        u = (mix(position.to(tl.uint32) * GOLDEN + key) >> 8).to(tl.float32) * 5.9604644775390625e-8
        chosen = m_b & (u < pi)
        reads += tl.where(m_b, pi, 0.0)
        hit = chosen.to(tl.int32)
        place = base + count + tl.cumsum(hit, 0) - hit
        tl.store(p_slots + place, slot, mask=chosen)
        tl.store(p_weights + place, 1.0 / pi, mask=chosen)
        count += tl.sum(hit, 0)
        slot, low_pair, high_pair, norm, usable = next_slot, next_low, next_high, next_norm, next_usable
    tl.store(p_counts + i_row * MOST + i_segment, count)
    tl.store(p_reads + i_row * MOST + i_segment, tl.sum(reads, 0))
