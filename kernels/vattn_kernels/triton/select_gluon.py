"""Stage ``select`` in Gluon: the first round's scores by integer tensor cores, ranks by ballots.

The same function as `vattn_kernels.triton.select.select_fwd_kernel`, which serves what `layout.tensor_cores_score`
leaves and which the interpreter runs; each list holds the same entries, in half of them with the last block first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vattn_kernels.triton.layout import (
    CODING,
    DENOMINATOR,
    ENTRY,
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
from vattn_kernels.triton.select import (
    GOLDEN,
    LEAST_OCTAVES,
    OCTAVES,
    is_shifted,
    key_of,
    load_fields,
    load_level,
    octaves_of,
    scramble,
)

# Heads that one tile's 8 columns hold, once for each of the four tokens that share a row.
TILE_HEADS = gl.constexpr(2)
# Below every level, and far enough from the end of 32 bits for a score.
NO_HEAD = gl.constexpr(-(1 << 30))
# Of 2^23, from which on a float32's fraction counts ones: the exponent's field, and the number itself.
FLOAT_EXPONENT = gl.constexpr(127 + 23)
FLOAT_BASE = gl.constexpr(float(1 << 23))
# Tokens of a block between two of one lane.
STEP = gl.constexpr(LISTS.value * RUN.value)


@gluon.jit
def dot_tile(code0, code1, code2, code3, q0, q1, acc0, acc1, acc2, acc3):
    """``acc`` plus 16 x 8 products over 32 dimensions: unsigned codes of tokens by signed queries of heads.

    A row's dimensions come from four lanes. Each gives codes of a token of its own, which meet zeros in the columns of
    the other three, and gets the products of that token: nothing has to move between lanes.
    """
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [code0, code1, code2, code3, q0, q1, acc0, acc1, acc2, acc3],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def from_lane(x, lane):
    """What another lane of the warp holds."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [x, lane], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def held(x, lane):
    """A number that the compiler takes for another in each lane, and so holds in a register."""
    return from_lane(x + lane % 2, lane & -2)


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
    # Bytes 0 to 3 are those of x, 4 to 7 those of `FLOAT_BASE`, in a register: an instruction takes one constant.
    pick: gl.constexpr = "prmt.b32 $0, $1, $2, 0x7650;" if BYTE == 0 else "prmt.b32 $0, $1, $2, 0x7614;"
    bits = gl.inline_asm_elementwise(
        pick, "=r,r,r", [x, 0 * x + (FLOAT_EXPONENT << 23)], dtype=gl.int32, is_pure=True, pack=1
    )
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def power_of_two(x):
    """``2^x``; results below 2^-126 are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def add_saturating(x, y):
    """``x + y`` within [0, 1]; what is no number, which only a query gives that is not finite, becomes 0."""
    return gl.inline_asm_elementwise(
        "add.sat.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def is_drawn(counter, pi):
    """Whether `vattn_kernels.triton.select.uniform` of a counter lies below ``pi``; both are taken as 2^23 (1 + x)."""
    bits = scramble(counter).to(gl.int32, bitcast=True)
    # The upper 23 bits become the fraction, behind the exponent of `FLOAT_BASE`.
    u = gl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, 9;", "=r,r,r", [bits, 0 * bits + FLOAT_EXPONENT], dtype=gl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip
    # Rounded up, so that what is less than pi lies below, and nothing else does.
    border = gl.inline_asm_elementwise(
        "fma.rp.f32 $0, $1, $2, $2;", "=f,f,r", [pi, 0 * bits + (FLOAT_EXPONENT << 23)], dtype=gl.float32, is_pure=True,
        pack=1,
    )  # fmt: skip
    return u.to(gl.float32, bitcast=True) < border


@gluon.jit
def load_where(p, wanted, BITS: gl.constexpr):
    """What lies at ``p``, or anything where it is not wanted, by all lanes or none."""
    at = p.to(gl.int64)
    where = 0 * at.to(gl.int32) + wanted.to(gl.int32)
    if BITS == 16:
        # A 16-bit register would have to be widened where it is used.
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p ld.global.nc.u16 $0, [$1]; }", "=r,l,r", [at, where],
            dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif BITS == 32:
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p ld.global.b32 $0, [$1]; }", "=r,l,r", [at, where],
            dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p ld.global.b64 $0, [$1]; }", "=l,l,r", [at, where],
            dtype=gl.int64, is_pure=True, pack=1,
        )  # fmt: skip


@gluon.jit
def load_slots(p_slots, position, high, wanted, MASKED: gl.constexpr):
    """Slots of a lane's tokens in a block, at distances known to the compiler.

    Where ``MASKED`` 0 behind the end; anything if the block is not wanted.
    """
    slots = ()
    for r in gl.static_range(REPEATS):
        if MASKED:
            slots = slots + (gl.load(p_slots + r * STEP, mask=(position < high - r * STEP) & wanted, other=0),)
        else:
            slots = slots + (load_where(p_slots + r * STEP, wanted, 32),)
    return slots


@gluon.jit
def load_codes(p_codes, slots, wanted, WORDS: gl.constexpr):
    """Words of the codes of each of a lane's tokens, in pairs, if wanted; slots of one head lie side by side."""
    words = ()
    for r in gl.static_range(REPEATS):
        # Unsigned offsets of 32 bits are enough for 2^28 slots.
        p_code = p_codes.to(gl.pointer_type(gl.uint8)) + (slots[r].to(gl.uint32) * (4 * WORDS)).to(gl.uint64)
        if WORDS == 1:
            own = (load_where(p_code, wanted, 32),)
        else:
            own = (load_where(p_code, wanted, 64),)
            if WORDS == 4:
                own = own + (load_where(p_code + 8, wanted, 64),)
        words = words + (own,)
    return words


@gluon.jit
def load_norms(p_norms, slots, wanted):
    """The two norms of each of a lane's tokens as one number, if wanted."""
    norms = ()
    for r in gl.static_range(REPEATS):
        p_norm = p_norms.to(gl.pointer_type(gl.uint8)) + (slots[r].to(gl.uint32) * 2).to(gl.uint64)
        norms = norms + (load_where(p_norm, wanted, 16),)
    return norms


@gluon.jit
def product(x, y):
    """``x * y``; the compiler would shift by what it knows to be a power of two, where masks and addresses wait."""
    return gl.inline_asm_elementwise(
        "mul.lo.s32 $0, $1, $2;", "=r,r,r", [x, 0 * x + y], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def codes_of(words, factors, masks, WORDS: gl.constexpr, GROUPS: gl.constexpr):
    """Codes of a token, those of four dimensions a number, of an even number of groups."""
    codes = ()
    for j in gl.static_range(GROUPS):
        word = words[(j % WORDS) // 2]
        if j % 2 == 1 and WORDS > 1:
            word = word >> 32
        code = word.to(gl.int32)
        if is_shifted(j, WORDS):
            code = product(code, factors[j])
        codes = codes + (code & masks[j],)
    if GROUPS % 2 == 1:
        codes = codes + (codes[0] * 0,)
    return codes


@gluon.jit
def best_scores(words, others, factors, masks, queries, levels, TILES: gl.constexpr, WORDS: gl.constexpr,
                GROUPS: gl.constexpr):  # fmt: skip
    """Largest scores of a group's heads for two tokens whose codes this lane holds, beyond the first head's level."""
    codes = codes_of(words, factors, masks, WORDS, GROUPS)
    more = codes_of(others, factors, masks, WORDS, GROUPS)
    zero = codes[0] * 0
    for t in gl.static_range(TILES):
        # Registers of the accumulator: two columns of one row, then of the row eight further.
        acc0, acc1, acc2, acc3 = zero, zero, zero, zero
        for j in gl.static_range(0, GROUPS, 2):
            q0, q1 = queries[t * GROUPS + j], zero
            if j + 1 < GROUPS:
                q1 = queries[t * GROUPS + j + 1]
            acc0, acc1, acc2, acc3 = dot_tile(
                codes[j], more[j], codes[j + 1], more[j + 1], q0, q1, acc0, acc1, acc2, acc3
            )
        even, odd = levels[TILE_HEADS * t], levels[TILE_HEADS * t + 1]
        if t == 0:
            first, second = acc0, acc2
        else:
            first, second = gl.maximum(acc0 + even, first), gl.maximum(acc2 + even, second)
        first, second = gl.maximum(acc1 + odd, first), gl.maximum(acc3 + odd, second)
    return first, second


@gluon.jit
def inclusion(best, norm, unit2, base, coding, least, WITH_VALUES: gl.constexpr):
    """Inclusion probability of a token."""
    # An error byte of 255 marks a slot without usable side data; this makes it certain.
    error2 = power_of_two(float_byte(norm, 0) * (2 * OCTAVES) + (2 * LEAST_OCTAVES - 2 * OCTAVES * FLOAT_BASE))
    if WITH_VALUES:
        base = float_byte(norm, 1) * (OCTAVES / 256) + base
    return add_saturating(power_of_two(unit2 * best.to(gl.float32) + (coding * error2 + base)), least)


@gluon.jit
def draw_blocks(
    blocks, step, slots, upcoming, words, norms, p_codes, p_norms, p_next, position, counter, high, at, reads,
    p_entries, below, factors, masks, queries, levels, unit2, base, coding, least,
    TILES: gl.constexpr, WORDS: gl.constexpr, GROUPS: gl.constexpr, WITH_VALUES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Store the chosen tokens of all blocks behind the ends ``at`` of the lists; the new ends and expected lengths.

    Codes and norms of the next block are asked for where the registers that hold this one's are free: with 64 a thread
    eight programs run on a multiprocessor, and so `Launch.programs` at once where there are 128 of them.
    """
    left = blocks
    while left > 0:
        left -= 1
        best = ()
        for r in gl.static_range(0, REPEATS, 2):
            best = best + best_scores(words[r], words[r + 1], factors, masks, queries, levels, TILES, WORDS, GROUPS)
        words = load_codes(p_codes, upcoming, left > 0, WORDS)
        probabilities = ()
        for r in gl.static_range(REPEATS):
            pi = inclusion(best[r], norms[r], unit2, base, coding, least, WITH_VALUES)
            if MASKED:
                pi = gl.where(position < high - r * STEP, pi, 0.0)
            probabilities = probabilities + (pi,)
        norms = load_norms(p_norms, upcoming, left > 0)
        for r in gl.static_range(REPEATS):
            pi = probabilities[r]
            chosen = is_drawn(counter + (r * STEP * GOLDEN) % (1 << 32), pi)
            reads += pi
            taken = ballot(chosen.to(gl.int32))
            entry = slots[r].to(gl.uint32).to(gl.int64) | (pi.to(gl.int32, bitcast=True).to(gl.int64) << 32)
            gl.store(p_entries + (at + ones(taken & below)), entry, mask=chosen)
            at += ones(taken)
        slots = upcoming
        p_next += step
        upcoming = load_slots(p_next, position + 2 * step, high, left > 1, MASKED)
        counter += step.to(gl.uint32) * GOLDEN
        position += step
    return at, reads


@gluon.jit(do_not_specialize=["seed", "layer"])
def select_lists_fwd_kernel(
    p_codes, p_norms, p_kv_indices, p_seq_lens, p_fields,
    p_mode, p_query, p_bias, p_log_scale, p_scale, p_entries, p_counts, p_reads, p_listed,
    sink, window, seed, layer, kv_stride, code_head, norm_head, capacity,
    HKV: gl.constexpr, G: gl.constexpr, R: gl.constexpr, GROUPS: gl.constexpr, WORDS: gl.constexpr,
    TARGET: gl.constexpr, SPLITS: gl.constexpr, MOST: gl.constexpr,
    SIGNALS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """One split a program: every ``SPLITS``-th block of a row's tokens, a list for each warp."""
    BLOCK: gl.constexpr = REPEATS * STEP
    TILES: gl.constexpr = (G + TILE_HEADS - 1) // TILE_HEADS
    WITH_VALUES: gl.constexpr = TARGET != DENOMINATOR
    lists: gl.constexpr = gl.BlockedLayout([1, 1], [1, RUN], [LISTS, 1], [1, 0])
    i_row, i_split = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    b, h = i_row // HKV, i_row % HKV
    n = gl.load(p_seq_lens + b).to(gl.int32)
    high = n - window
    key = key_of(seed, layer, h, n)
    shifts, masks = load_fields(p_fields, h, R, GROUPS)
    factors = ()
    for j in gl.static_range(GROUPS):
        factors = factors + (1 << shifts[j],)

    o_list = gl.arange(0, LISTS, layout=gl.SliceLayout(1, lists))
    o_lane = gl.arange(0, RUN, layout=gl.SliceLayout(0, lists))
    i_list = o_list[:, None] + 0 * o_lane[None, :]  # [LISTS, RUN]
    lane = o_lane[None, :] + 0 * o_list[:, None]
    p_code_head, p_norm_head = p_codes + h.to(gl.int64) * code_head, p_norms + h.to(gl.int64) * norm_head
    p_indices = p_kv_indices + b.to(gl.int64) * kv_stride
    stride: gl.constexpr = SPLITS * BLOCK
    begin = sink + i_split * BLOCK
    blocks = gl.maximum(high - begin + stride - 1, 0) // stride
    # First token of a lane in a block.
    position = begin + i_list * RUN + lane
    # No constant, as its sign is not.
    step = stride + 0 * n
    # Half of the programs go backward, so that not all come at once to slots taken in turns with other requests.
    if gl.program_id(0).to(gl.uint32) * GOLDEN >> 31 == 1:
        position += gl.maximum(blocks - 1, 0) * stride
        step = -step
    p_next = p_indices + position + step
    # The next block's codes are under way while this one is drawn from, and the slots of the one after it.
    slots = load_slots(p_indices + position, position, high, blocks > 0, True)
    upcoming = load_slots(p_next, position + step, high, blocks > 1, True)
    words = load_codes(p_code_head, slots, blocks > 0, WORDS)
    norms = load_norms(p_norm_head, slots, blocks > 0)
    # Exchanged with itself, as the compiler would hash the key behind the branch on the mode.
    counter = from_lane((position.to(gl.uint32) * GOLDEN + key).to(gl.int32, bitcast=True), lane)
    counter = counter.to(gl.uint32, bitcast=True)
    # All above is loaded while `prepare` still runs, which does not write it.
    await_last(DEPENDENT)
    begin_next(DEPENDENT)
    p_signal = p_listed + i_row * SIGNALS + i_split
    mode = gl.load(p_mode + i_row)
    p_own = p_scale + i_row * NUM_SCALES
    unit, coding, least = gl.load(p_own + UNIT), gl.load(p_own + CODING), gl.load(p_own + FLOOR)
    unit2 = unit * LOG2E
    # Where a tile's operands lie in the lanes: PTX ISA, matrix fragments for mma.m16n8k32.
    column, quarter = lane // 4, lane % 4
    levels = ()
    queries = ()
    for t in gl.static_range(TILES):
        for half in gl.static_range(TILE_HEADS):
            level = NO_HEAD
            if TILE_HEADS * t + half < G:
                level = load_level(p_bias, p_log_scale, i_row * G + TILE_HEADS * t + half, unit)
            levels = levels + (level,)
        head = TILE_HEADS * t + column % TILE_HEADS
        for j in gl.static_range(GROUPS):
            query = gl.load(
                p_query.to(gl.pointer_type(gl.int32)) + (i_row * G + head) * GROUPS + j,
                mask=(head < G) & (column // TILE_HEADS == quarter), other=0,
            )  # fmt: skip
            queries = queries + (query,)
    base = octaves_of(levels[0], unit)
    beyond = ()
    for j in gl.static_range(TILES * TILE_HEADS):
        beyond = beyond + (levels[j] - levels[0],)
    if WITH_VALUES:
        base += LEAST_OCTAVES - OCTAVES / 256 * FLOAT_BASE
    base = held(base.to(gl.int32, bitcast=True) + 0 * lane, lane).to(gl.float32, bitcast=True)
    # Asked only now, so that all of the query is on its way with the mode.
    if mode != SAMPLED:
        signal(p_signal, DEPENDENT)
        return
    below = (1 << lane) - 1

    span = capacity // (SPLITS * LISTS)
    own_list = i_row.to(gl.int64) * capacity + i_split * LISTS * span
    p_own_entries = (p_entries + ENTRY * own_list).to(gl.pointer_type(gl.int64))
    reads = gl.zeros([LISTS, RUN], gl.float32, lists)
    # Only where the range ends within one of the blocks, their last, is there a token to leave out.
    if begin + blocks * stride - stride + BLOCK <= high:
        at, reads = draw_blocks(
            blocks, step, slots, upcoming, words, norms, p_code_head, p_norm_head, p_next, position, counter, high,
            i_list * span, reads, p_own_entries, below, factors, masks, queries, beyond, unit2, base, coding, least,
            TILES, WORDS, GROUPS, WITH_VALUES, False,
        )  # fmt: skip
    else:
        at, reads = draw_blocks(
            blocks, step, slots, upcoming, words, norms, p_code_head, p_norm_head, p_next, position, counter, high,
            i_list * span, reads, p_own_entries, below, factors, masks, queries, beyond, unit2, base, coding, least,
            TILES, WORDS, GROUPS, WITH_VALUES, True,
        )  # fmt: skip
    p_own = p_counts + i_row * MOST + i_split * LISTS
    gl.store(p_own + o_list, gl.max(at - i_list * span, 1))
    gl.store(p_reads + i_row * MOST + i_split * LISTS + o_list, gl.sum(reads, 1))
    signal(p_signal, DEPENDENT)
