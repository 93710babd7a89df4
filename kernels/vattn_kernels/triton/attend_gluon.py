"""Stage ``attend`` for bfloat16 in Gluon: the first round's lists, one warp a split.

The same function as `vattn_kernels.triton.attend.attend_fwd_kernel`, which serves what `layout.one_warp_attends`
leaves and which the interpreter runs. A warp of its own waits for no other warp; K and V go through shared memory by
asynchronous copies, so that the next tile is under way without holding registers; heads are the narrow side of the
tensor cores' tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vattn_kernels.triton.attend import place_of
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

# Tokens of a tile: the tensor cores' inner dimension.
TILE = gl.constexpr(16)
BUFFERS = gl.constexpr(2)
# The group's heads and their variances.
ROWS = gl.constexpr(8)


@gluon.jit
def fetch(keys, values, p_kh, p_vh, slot, o_d, STRIDE: gl.constexpr, copied: gl.constexpr):
    """Begin to copy one tile of K and V; rows without a token, whose slot is negative, are filled with zeros."""
    slot = gl.convert_layout(slot, gl.SliceLayout(1, copied))
    ok = slot >= 0
    at = (slot.to(gl.uint32).to(gl.uint64) * STRIDE)[:, None] + o_d[None, :]
    is_there = ok[:, None] & (o_d >= 0)[None, :]
    async_copy.async_copy_global_to_shared(keys, p_kh + at, mask=is_there)
    async_copy.async_copy_global_to_shared(values, p_vh + at, mask=is_there)
    async_copy.commit_group()


@gluon.jit
def rows_in_use(tile):
    """The first `ROWS` of a tile's 16 rows, which are in other registers than the rest."""
    used, _ = gl.split(gl.permute(gl.reshape(tile, [2, ROWS, tile.shape[1]]), (1, 2, 0)))
    return used


@gluon.jit
def attend_lists_fwd_kernel(
    p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_mode, p_entries, p_counts, p_outs, p_scalars, p_listed, p_attended,
    p_codes, p_norms, p_fields, p_query, p_bias, p_log_scale, p_scale, p_asked, p_valid,
    sm_scale, sink, window, kv_stride, row_stride, code_head, norm_head, capacity,
    HKV: gl.constexpr, G: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr,
    MOST: gl.constexpr, TARGET: gl.constexpr, R: gl.constexpr, GROUPS: gl.constexpr, WORDS: gl.constexpr,
    DP4A: gl.constexpr, SELECTOR: gl.constexpr, UNIFORM: gl.constexpr, SURVEYED: gl.constexpr,
    SIGNALS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """One split a program: its lists, or, behind the last split, sink and window; that program surveys too.

    Rows [0, G) are the group's heads, which weigh by w y; rows [G, 2G) are their variances, by w (w - 1) y^2.
    """
    gl.static_assert(2 * G <= ROWS, "heads and variances of a group fill the rows in use")
    begin_next(DEPENDENT)
    i_row, i_split = gl.program_id(0) // (SPLITS + 1), gl.program_id(0) % (SPLITS + 1)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    repeated: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 4, 8], [1, 1, 1], [2, 1, 0])

    b, h = i_row // HKV, i_row % HKV
    listed = i_split < SPLITS
    n = gl.load(p_seq_lens + b).to(gl.int32)
    span = capacity // (SPLITS * LISTS)
    base = i_row.to(gl.int64) * capacity + gl.where(listed, i_split, 0) * (LISTS * span)
    p_indices = p_kv_indices + b.to(gl.int64) * kv_stride
    p_list = p_entries + ENTRY * base
    p_pi = probabilities_of(p_list)
    # Slots of the context stand alone.
    each = gl.where(listed, ENTRY, 1)
    if not listed:
        p_list = p_indices
    o_q = gl.arange(0, 16, layout=gl.SliceLayout(1, left))
    d_q = gl.arange(0, D, layout=gl.SliceLayout(0, left))
    q = gl.load(p_q + (i_row * G + o_q % G)[:, None] * D + d_q[None, :], mask=(o_q < 2 * G)[:, None], other=0.0)
    o_t = gl.arange(0, TILE, layout=lanes)
    # All above is loaded while `select` still runs, which does not write it.
    await_signals(p_listed + i_row * SIGNALS + gl.minimum(i_split, SPLITS - 1), 1, DEPENDENT)
    if not listed:
        # Not before the last split is listed, as so many would take what `select` needs of the second-level cache; and
        # two a lane, as one left out would need its answer from another.
        each_split = gl.arange(0, SIGNALS, layout=lanes) % SPLITS
        await_each(p_listed + i_row * SIGNALS, each_split, SIGNALS, DEPENDENT)
    # Splits begin at different lists, whose tokens lie in different parts of the cache.
    i_first = gl.where(listed, i_split % LISTS, 0)
    # Where the first tile mostly lies, on its way with the counts that tell.
    slot = gl.load(p_list + each * (i_first * span + o_t), mask=o_t < gl.where(listed, TILE, n), other=0)
    mode = gl.load(p_mode + i_row)
    # Sink and window are two lists.
    low, high = sampled_range(n, sink, window)
    borders = ()
    jumps = ()
    total = 0
    end = 0
    for j in gl.static_range(LISTS):
        i_list = (i_first + j) % LISTS
        own = gl.load(p_counts + i_row * MOST + LISTS * i_split + i_list, mask=listed, other=0)
        start = i_list * span
        if j == 0:
            own = gl.where(listed, own, low)
        if j == 1:
            own = gl.where(listed, own, n - high)
            start = gl.where(listed, start, high)
        if j > 0:
            borders = borders + (total,)
            jumps = jumps + (start - end,)
        else:
            first = start
        end = start + own
        total += own
    # Asked only now, so that the counts are on their way with the mode.
    if mode != SAMPLED:
        signal(p_attended + i_row, DEPENDENT)
        return

    keys = gl.allocate_shared_memory(p_k.dtype.element_ty, [BUFFERS, TILE, D], swizzled)
    values = gl.allocate_shared_memory(p_v.dtype.element_ty, [BUFFERS, TILE, D], swizzled)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copied))
    p_kh, p_vh = p_k + h * D, p_v + h * D
    zeros = gl.zeros([16, TILE], gl.float32, mma)
    nothing = rows_in_use(zeros)
    rows: gl.constexpr = nothing.type.layout
    o_w = gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows))
    o_n = gl.arange(0, TILE, layout=gl.SliceLayout(0, rows))
    is_square = (o_w >= G) & (o_w < 2 * G)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, rows))
    mass = nothing
    spread = nothing
    acc = gl.zeros([D, ROWS], gl.float32, mma)
    square = gl.zeros([16, ROWS], gl.float32, mma)

    # A tile goes on in the next list where one has ended.
    place = place_of(o_t, first, borders, jumps)
    if borders[0] < TILE:
        slot = gl.load(p_list + each * place, mask=o_t < total, other=-1)
    fetch(keys.index(0), values.index(0), p_kh, p_vh, gl.where(o_t < total, slot, -1), o_d, HKV * D, copied)
    pi = gl.load(p_pi + ENTRY * place, mask=(o_t < total) & listed, other=1.0)
    index = o_t + TILE
    place = place_of(index, first, borders, jumps)
    slot = gl.load(p_list + each * place, mask=index < total, other=-1)
    for start in range(0, total, TILE):
        i_buffer = start // TILE % BUFFERS
        i_next = (i_buffer + 1) % BUFFERS
        async_copy.wait_group(0)
        fetch(keys.index(i_next), values.index(i_next), p_kh, p_vh, slot, o_d, HKV * D, copied)
        weight_ = gl.convert_layout(1.0 / pi, gl.SliceLayout(0, rows))
        share_ = gl.convert_layout(1.0 - pi, gl.SliceLayout(0, rows))
        pi = gl.load(p_pi + ENTRY * place, mask=(index < total) & listed, other=1.0)
        index += TILE
        place = place_of(index, first, borders, jumps)
        slot = gl.load(p_list + each * place, mask=index < total, other=-1)
        ok = start + o_n < total

        k = keys.index(i_buffer).permute((1, 0)).load(right)
        logits = rows_in_use(mma_v2(q, k, zeros))
        logits = gl.where(ok[None, :], logits * (sm_scale * LOG2E), float("-inf"))
        larger = gl.maximum(maximum, gl.max(logits, 1))
        weight = weight_[None, :]
        open_share = share_[None, :]
        y = gl.exp2(logits - larger[:, None])
        p = gl.where(is_square[:, None], weight * (weight - 1.0) * y * y, weight * y)
        alpha = gl.exp2(maximum - larger)
        alpha = gl.where(is_square, alpha * alpha, alpha)
        maximum = larger
        mass = mass * alpha[:, None] + p
        spread = spread * (alpha * alpha)[:, None] + p * p * open_share

        scaled = gl.convert_layout(alpha, gl.SliceLayout(0, mma))[None, :]
        weights = gl.convert_layout(gl.permute(p, (1, 0)).to(p_v.dtype.element_ty), right)
        v = values.index(i_buffer).permute((1, 0)).load(left)  # [D, TILE]
        acc = mma_v2(v, weights, acc * scaled)
        # sum(p |v|^2) by 16 dimensions at a time, all into one tile: the inner dimension is (dimension / 16, token).
        v2 = gl.permute(gl.reshape(v * v, [D // 16, 16, TILE]), (1, 0, 2))
        v2 = gl.convert_layout(gl.reshape(v2, [16, D // 16 * TILE]), left)
        again = gl.convert_layout(weights, gl.SliceLayout(0, repeated))[None, :, :]
        again, _ = gl.broadcast(again, gl.full([D // 16, TILE, ROWS], 0.0, p_v.dtype.element_ty, repeated))
        again = gl.convert_layout(gl.reshape(again, [D // 16 * TILE, ROWS]), right)
        square = mma_v2(v2, again, square * scaled)
    async_copy.wait_group(0)

    i_part = i_row * (SPLITS + 1) + i_split
    stored: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    o_c = gl.arange(0, D, layout=gl.SliceLayout(0, stored))
    p_part = p_outs + (i_part.to(gl.int64) * WIDTH + o_r[:, None]) * D + o_c[None, :]
    gl.store(p_part, gl.convert_layout(gl.permute(acc, (1, 0)), stored), mask=(o_r < 2 * G)[:, None])
    p_own = p_scalars + i_part * (NUM_SCALARS * WIDTH)
    gl.store(p_own + MAXIMUM * WIDTH + o_w, maximum)
    gl.store(p_own + MASS * WIDTH + o_w, gl.sum(mass, 1))
    gl.store(p_own + SPREAD * WIDTH + o_w, gl.sum(spread, 1))
    o_s = gl.arange(0, ROWS, layout=gl.SliceLayout(0, mma))
    gl.store(p_own + SQUARE * WIDTH + o_s, gl.sum(square, 0))
    # Sink and window are soonest done. Apart, as Triton leaves out only what a constant alone rules out.
    if not UNIFORM:
        if i_split == SPLITS:
            survey_row(
                gl.arange(0, SURVEYED, layout=lanes), i_row, n, p_codes, p_norms, p_fields, p_query, p_bias,
                p_log_scale, p_scale, p_entries, p_counts, p_asked, p_valid, p_v, sm_scale, row_stride, code_head,
                norm_head, capacity,
                HKV, G, D, R, GROUPS, WORDS, TARGET != DENOMINATOR, SPLITS, MOST, DP4A, SELECTOR, SURVEYED,
            )  # fmt: skip
    signal(p_attended + i_row, DEPENDENT)
