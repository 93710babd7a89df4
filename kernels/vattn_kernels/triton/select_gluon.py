"""Stage ``select`` in Gluon: the first round's scores by integer tensor cores, ranks by ballots.

The same function as `vattn_kernels.triton.select.select_fwd_kernel`, which serves what `layout.tensor_cores_score`
leaves and which the interpreter runs; the lists are the same, entry by entry.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vattn_kernels.triton.layout import (
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
)
from vattn_kernels.triton.select import GOLDEN, LANES, LEAST_OCTAVES, OCTAVES, RANDOM_UNIT, key_of, load_fields, mix

# Heads that one tile's 16 rows hold, once for each of the four tokens that share a column.
TILE_HEADS = gl.constexpr(4)
# Below every level, and far enough from the end of 32 bits for a score.
NO_HEAD = gl.constexpr(-(1 << 30))
# What `float_byte` adds.
FLOAT_BASE = gl.constexpr(float(1 << 23))


@gluon.jit
def dot_tile(q0, q1, q2, q3, code0, code1, acc0, acc1, acc2, acc3):
    """``acc`` plus 16 x 8 products over 32 dimensions: signed queries (head, token) by unsigned codes.

    A column's dimensions come from four lanes. Each gives codes of a token of its own, which meet zeros in the rows of
    the other three: so codes are multiplied in the lane that loaded them.
    """
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [q0, q1, q2, q3, code0, code1, acc0, acc1, acc2, acc3],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def from_lane(x, lane):
    """What another lane of the warp holds."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [x, lane], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def ballot(x):
    """A bit for each lane of the warp: whether its ``x`` is not 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r", [x],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def ones(x):
    """Number of bits set."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def float_byte(x, BYTE: gl.constexpr):
    """Byte 0 of ``x``, or byte 1 times 256, as a float32, larger by `FLOAT_BASE`."""
    # Bytes 0 to 3 are those of x, 4 to 7 those of `FLOAT_BASE`.
    pick: gl.constexpr = "prmt.b32 $0, $1, 0x4b000000, 0x7650;" if BYTE == 0 else "prmt.b32 $0, $1, 0x4b000000, 0x7614;"
    bits = gl.inline_asm_elementwise(pick, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def power_of_two(x):
    """``2^x``; results below 2^-126 are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def load_side(p_codes, p_norms, slot, WORDS: gl.constexpr):
    """Words of the codes in pairs, and the two norms as one number; slots of one head lie side by side."""
    # Unsigned offsets of 32 bits, enough for 2^28 slots, are added by the load itself.
    index = slot.to(gl.uint32)
    p_norm = p_norms.to(gl.pointer_type(gl.uint8)) + (index * 2).to(gl.uint64)
    # A 16-bit register would have to be widened where it is used.
    norm = gl.inline_asm_elementwise(
        "ld.global.nc.u16 $0, [$1];", "=r,l", [p_norm.to(gl.int64)], dtype=gl.int32, is_pure=True, pack=1
    )
    p_code = p_codes.to(gl.pointer_type(gl.uint8)) + (index * (4 * WORDS)).to(gl.uint64)
    if WORDS == 1:
        words = (gl.load(p_code.to(gl.pointer_type(gl.int32))),)
    else:
        p_pair = p_code.to(gl.pointer_type(gl.int64))
        words = (gl.load(p_pair),)
        if WORDS == 4:
            words = words + (gl.load(p_pair + 1),)
    return words, norm


@gluon.jit
def best_score(words, shifts, masks, queries, levels, is_upper, twin, source, TILES: gl.constexpr, WORDS: gl.constexpr,
               GROUPS: gl.constexpr):  # fmt: skip
    """Largest score of the group's heads for the token whose codes this lane holds."""
    codes = ()
    for j in gl.static_range(GROUPS):
        word = words[(j % WORDS) // 2]
        if j % 2 == 1 and WORDS > 1:
            word = word >> 32
        code = word.to(gl.int32)
        # A word's first group lies at its bottom.
        if j >= WORDS:
            code = code >> shifts[j]
        codes = codes + (code & masks[j],)
    if GROUPS % 2 == 1:
        codes = codes + (codes[0] * 0,)
    for t in gl.static_range(TILES):
        # Registers of the accumulator: two columns of one row, then of the row eight further.
        acc0 = levels[2 * t] + 0 * codes[0]
        acc2 = levels[2 * t + 1] + 0 * codes[0]
        acc1 = acc0
        acc3 = acc2
        for j in gl.static_range(0, GROUPS, 2):
            q0, q1 = queries[2 * t * GROUPS + j], queries[(2 * t + 1) * GROUPS + j]
            q2 = q0 * 0
            q3 = q2
            if j + 1 < GROUPS:
                q2, q3 = queries[2 * t * GROUPS + j + 1], queries[(2 * t + 1) * GROUPS + j + 1]
            acc0, acc1, acc2, acc3 = dot_tile(q0, q1, q2, q3, codes[j], codes[j + 1], acc0, acc1, acc2, acc3)
        if t == 0:
            first, second = gl.maximum(acc0, acc2), gl.maximum(acc1, acc3)
        else:
            first = gl.maximum(first, gl.maximum(acc0, acc2))
            second = gl.maximum(second, gl.maximum(acc1, acc3))
    kept = gl.where(is_upper, second, first)
    given = gl.where(is_upper, first, second)
    return from_lane(gl.maximum(kept, from_lane(given, twin)), source)


@gluon.jit
def inclusion(best, norm, unit2, coding, least, WITH_VALUES: gl.constexpr):
    """Inclusion probability of a token."""
    # An error byte of 255 marks a slot without usable side data; this makes it certain.
    error2 = power_of_two(float_byte(norm, 0) * (2 * OCTAVES) + (2 * LEAST_OCTAVES - 2 * OCTAVES * FLOAT_BASE))
    log_pi = unit2 * best.to(gl.float32) + coding * error2
    if WITH_VALUES:
        log_pi += float_byte(norm, 1) * (OCTAVES / 256) + (LEAST_OCTAVES - OCTAVES / 256 * FLOAT_BASE)
    return gl.minimum(power_of_two(log_pi) + least, 1.0)


@gluon.jit(do_not_specialize=["seed", "layer"])
def select_lists_fwd_kernel(
    p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
    p_mode, p_query, p_bias, p_log_scale, p_scale, p_slots, p_pi, p_counts, p_reads, p_listed,
    sink, window, seed, layer, kv_stride, code_head, norm_head, capacity,
    HKV: gl.constexpr, G: gl.constexpr, R: gl.constexpr, GROUPS: gl.constexpr, WORDS: gl.constexpr,
    TARGET: gl.constexpr, SPLITS: gl.constexpr, MOST: gl.constexpr,
    SIGNALS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """One split a program: every ``SPLITS``-th block of a row's tokens, a list for each warp."""
    BLOCK: gl.constexpr = REPEATS * LISTS * RUN
    TILES: gl.constexpr = (G + TILE_HEADS - 1) // TILE_HEADS
    lists: gl.constexpr = gl.BlockedLayout([1, 1, REPEATS], [1, RUN, 1], [LISTS, 1, 1], [2, 1, 0])
    i_row, i_split = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    b, h = i_row // HKV, i_row % HKV
    n = gl.load(p_seq_lens + b).to(gl.int32)
    high = n - window
    key = key_of(seed, layer, h, n)
    shifts, masks = load_fields(p_fields, h, R, GROUPS)

    o_list = gl.arange(0, LISTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, lists)))
    o_lane = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(2, lists)))
    o_repeat = gl.arange(0, REPEATS, layout=gl.SliceLayout(0, gl.SliceLayout(1, lists)))[None, None, :]
    i_list = (o_list[:, None] + 0 * o_lane[None, :])[:, :, None]  # [LISTS, RUN, 1]
    lane = (o_lane[None, :] + 0 * o_list[:, None])[:, :, None]
    p_code_head, p_norm_head = p_codes + h.to(gl.int64) * code_head, p_norms + h.to(gl.int64) * norm_head
    p_indices = p_kv_indices + b.to(gl.int64) * kv_stride
    step: gl.constexpr = LISTS * RUN
    stride = SPLITS * BLOCK
    # First token of a lane in a block; the others follow at a distance known to the compiler.
    position = sink + i_split * BLOCK + i_list * RUN + lane
    p_next = p_indices + position
    # The next block's codes are under way while this one is scored, and the slots of the one after it.
    slot = gl.load(p_next + o_repeat * step, mask=position < high - o_repeat * step, other=0)
    p_next += stride
    upcoming = gl.load(p_next + o_repeat * step, mask=position < high - stride - o_repeat * step, other=0)
    words, norm = load_side(p_code_head, p_norm_head, slot, WORDS)

    # All above is loaded while `prepare` still runs, which does not write it.
    await_last(DEPENDENT)
    begin_next(DEPENDENT)
    p_signal = p_listed + i_row * SIGNALS + i_split
    mode = gl.load(p_mode + i_row)
    p_own = p_scale + i_row * NUM_SCALES
    unit, coding, least = gl.load(p_own + UNIT), gl.load(p_own + CODING), gl.load(p_own + FLOOR)
    unit2 = unit * LOG2E
    # Where a tile's operands lie in the lanes: PTX ISA, matrix fragments for mma.m16n8k32.
    row, quarter = lane // 4, lane % 4
    levels = ()
    queries = ()
    for t in gl.static_range(TILES):
        for half in gl.static_range(2):
            head = TILE_HEADS * t + 2 * half + row // 4
            own = i_row * G + head
            bias = gl.load(p_bias + own, mask=head < G, other=0.0)
            log_scale = gl.load(p_log_scale + own, mask=head < G, other=0.0)
            level = gl.minimum(gl.maximum((bias + log_scale) / unit, -1.0e9), 1.0e9)
            levels = levels + (gl.where(head < G, gl.floor(level + 0.5).to(gl.int32), NO_HEAD),)
            for j in gl.static_range(GROUPS):
                query = gl.load(
                    p_query.to(gl.pointer_type(gl.int32)) + own * GROUPS + j,
                    mask=(head < G) & (row % 4 == quarter), other=0,
                )  # fmt: skip
                queries = queries + (query,)
    # Asked only now, so that all of the query is on its way with the mode.
    if mode != SAMPLED:
        signal(p_signal, DEPENDENT)
        return
    is_upper = lane >= RUN // 2
    twin = lane ^ (RUN // 2)
    # The lane that holds this lane's score once the halves of the warp have exchanged heads.
    source = lane // 4 % 2 * 16 + quarter * 4 + lane // 8
    below = (1 << lane) - 1

    span = capacity // (SPLITS * LISTS)
    own_list = i_row.to(gl.int64) * capacity + i_split * LISTS * span
    p_own_slots, p_own_pi = p_slots + own_list, p_pi + own_list
    at = i_list * span
    shift = 8 * o_repeat
    reads = gl.zeros([LISTS, RUN, REPEATS], gl.float32, lists)
    for _start in range(sink + i_split * BLOCK, high, stride):
        # Behind the end slot 0 is read and not chosen.
        next_words, next_norm = load_side(p_code_head, p_norm_head, upcoming, WORDS)
        next_slot = upcoming
        p_next += stride
        upcoming = gl.load(p_next + o_repeat * step, mask=position < high - 2 * stride - o_repeat * step, other=0)
        best = best_score(words, shifts, masks, queries, levels, is_upper, twin, source, TILES, WORDS, GROUPS)
        pi = inclusion(best, norm, unit2, coding, least, TARGET != DENOMINATOR)
        counter = position.to(gl.uint32) * GOLDEN + key + o_repeat.to(gl.uint32) * (step * GOLDEN % (1 << 32))
        u = (mix(counter) >> 8).to(gl.float32) * RANDOM_UNIT
        ok = position < high - o_repeat * step
        chosen = ok & (u < pi)
        reads += gl.where(ok, pi, 0.0)
        taken = ballot(chosen.to(gl.int32))
        hits = gl.sum(ones(taken) << shift, 2)[:, :, None]
        # Byte j of the product is the sum of the bytes below j.
        place = at + ones(taken & below) + (((hits * 0x01010100) >> shift) & 0xFF)
        gl.store(p_own_slots + place, slot, mask=chosen)
        gl.store(p_own_pi + place, pi, mask=chosen)
        at += ((hits * LANES) >> 24) & 0xFF
        position += stride
        slot, words, norm = next_slot, next_words, next_norm
    p_own = p_counts + i_row * MOST + i_split * LISTS
    gl.store(p_own + o_list, gl.max(gl.max(at - i_list * span, 2), 1))
    gl.store(p_reads + i_row * MOST + i_split * LISTS + o_list, gl.sum(gl.sum(reads, 2), 1))
    signal(p_signal, DEPENDENT)
