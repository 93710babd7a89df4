"""Stage ``attend``: attention over the lists, or over everything, with what the error estimate needs in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.layout import DONE, MASS, MAXIMUM, MOMENT, NUM_SCALARS, SAMPLED, SQUARES

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_fwd_kernel(
    p_q, p_k, p_v, p_kv_indices, p_seq_lens, p_mode, p_slots, p_weights, p_counts, p_outs, p_scalars,
    sm_scale, sink, window, kv_stride, k_stride, capacity,
    HKV: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_segment, i_row = tl.program_id(0), tl.program_id(1)
    mode = tl.load(p_mode + i_row)
    if mode == DONE:
        return
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    low = tl.minimum(sink, n)
    is_fixed = i_segment == SEGMENTS
    listed = (mode == SAMPLED) & (i_segment < SEGMENTS)
    blocks = (n + BLOCK - 1) // BLOCK
    count = tl.maximum((blocks - i_segment + SEGMENTS - 1) // SEGMENTS, 0) * BLOCK
    if mode == SAMPLED:
        count = low + n - tl.maximum(n - window, low)
        if i_segment < SEGMENTS:
            count = tl.load(p_counts + i_row * MOST + i_segment)
    elif is_fixed:
        count = 0
    own = capacity // SEGMENTS
    base = i_row.to(tl.int64) * capacity + i_segment * own

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
    squares = tl.zeros([WIDTH, BN], tl.float32)
    moment0 = tl.zeros([WIDTH, BN], tl.float32)
    moment1 = tl.zeros([WIDTH, BN], tl.float32)
    moment2 = tl.zeros([WIDTH, BN], tl.float32)
    p_indices = p_kv_indices + b.to(tl.int64) * kv_stride
    for start in tl.range(0, count, BN, num_stages=STAGES):
        index = start + tl.arange(0, BN)
        ok = index < count
        position = (i_segment + index // BLOCK * SEGMENTS) * BLOCK + index % BLOCK
        if mode == SAMPLED:
            position = tl.where(index < low, index, n - count + index)
        ok = ok & (position < n) | (ok & listed)
        p_slot = tl.where(listed, p_slots + base + index, p_indices + position)
        slot = tl.load(p_slot, mask=ok, other=0).to(tl.int64)
        weight = tl.load(p_weights + base + index, mask=ok & listed, other=1.0)
        at = slot[:, None] * k_stride + h * D + o_d[None, :]
        k = tl.load(p_k + at, mask=ok[:, None] & m_d[None, :], other=0.0)  # [BN, DP]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (sm_scale * LOG2E)
        logits = tl.where(ok[None, :], logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        level = tl.where(larger == float("-inf"), 0.0, larger)
        y = tl.exp2(logits - level[:, None])
        p = tl.where(is_square[:, None], (weight * (weight - 1.0))[None, :] * y * y, weight[None, :] * y)
        alpha = tl.exp2(maximum - level)
        alpha = tl.where(is_square, alpha * alpha, alpha)
        maximum = larger
        v = tl.load(p_v + at, mask=ok[:, None] & m_d[None, :], other=0.0)
        wide = v.to(tl.float32)
        norm2 = tl.sum(wide * wide, 1)
        if WIDE:
            acc = acc * alpha[:, None] + tl.dot(p, wide, input_precision="tf32")
        else:
            acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v)
        mass = mass * alpha[:, None] + p
        squares = squares * alpha[:, None] + p * norm2[None, :]
        share = p * p * (1.0 - 1.0 / weight)[None, :]
        beta = (alpha * alpha)[:, None]
        moment0 = moment0 * beta + share
        moment1 = moment1 * beta + share * norm2[None, :]
        moment2 = moment2 * beta + share * (norm2 * norm2)[None, :]
    i_split = i_row * (SEGMENTS + 1) + i_segment
    p_out = p_outs + (i_split.to(tl.int64) * WIDTH + o_w[:, None]) * DP + o_d[None, :]
    tl.store(p_out, acc, mask=(o_w < 2 * G)[:, None])
    p_own = p_scalars + i_split * NUM_SCALARS * WIDTH + o_w
    tl.store(p_own + MAXIMUM * WIDTH, maximum)
    tl.store(p_own + MASS * WIDTH, tl.sum(mass, 1))
    tl.store(p_own + SQUARES * WIDTH, tl.sum(squares, 1))
    tl.store(p_own + MOMENT * WIDTH, tl.sum(moment0, 1))
    tl.store(p_own + (MOMENT + 1) * WIDTH, tl.sum(moment1, 1))
    tl.store(p_own + (MOMENT + 2) * WIDTH, tl.sum(moment2, 1))
