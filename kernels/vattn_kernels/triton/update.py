"""Stage ``update``: code the keys of new slots in all layers; the math is `vattn_kernels.reference.sketch.encode`."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.sketch import NORM_STEPS_PER_OCTAVE, NORM_ZERO

# Levels of a byte an octave of a squared norm, and the level of 1, rounded down behind a half.
STEPS = tl.constexpr(NORM_STEPS_PER_OCTAVE / 2)
ZERO = tl.constexpr(NORM_ZERO + 0.5)


@triton.jit
def level_of(square):
    """Byte of a norm from its square, see `vattn_kernels.sketch`."""
    level = tl.floor(tl.log2(tl.maximum(square, 1e-38)) * STEPS + ZERO)
    return tl.minimum(tl.maximum(level, 0.0), 255.0).to(tl.uint8)


@triton.jit
def update_fwd_kernel(
    p_k, p_v, p_pools, p_scales, p_new, p_mean, p_key_basis, p_steps, p_fields, p_codes, p_norms, p_valid,
    num_new, k_stride, code_layer, code_head, norm_layer, norm_head, valid_layer,
    HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    WORDS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Pools are addresses, K's of every layer and then V's, and so are scales; ``p_k`` and ``p_v`` only give types."""
    i_block, h, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_k = tl.load(p_pools + i_layer).to(p_k.dtype)
    p_v = tl.load(p_pools + tl.num_programs(2) + i_layer).to(p_v.dtype)
    k_scale, v_scale = tl.load(p_scales + i_layer), tl.load(p_scales + tl.num_programs(2) + i_layer)
    row = i_layer * HKV + h
    o_t, o_d = i_block * BT + tl.arange(0, BT), tl.arange(0, DP)
    m_t, m_d = o_t < num_new, o_d < D
    slot = tl.load(p_new + o_t, mask=m_t, other=0)
    at = slot[:, None] * k_stride + h * D + o_d[None, :]
    mask = m_t[:, None] & m_d[None, :]
    mean = tl.load(p_mean + row * D + o_d, mask=m_d, other=0.0)
    k = tl.load(p_k + at, mask=mask, other=0.0).to(tl.float32) * k_scale
    offset = tl.where(mask, k - mean[None, :], 0.0)  # [BT, DP]
    v = tl.load(p_v + at, mask=mask, other=0.0).to(tl.float32) * v_scale
    basis = p_key_basis + row.to(tl.int64) * D * D
    error = tl.zeros([BT], tl.float32)
    words = ()
    for _ in tl.static_range(WORDS):
        words = words + (tl.zeros([BT], tl.int32),)
    # A tile of few columns, as the basis of a wide head fills registers and shared memory.
    for start in tl.static_range(0, C, F):
        o_r = start + tl.arange(0, F)
        m_r = o_r < R
        part = tl.load(basis + o_d[:, None] * D + o_r[None, :], mask=m_d[:, None] & m_r[None, :], other=0.0)
        z = tl.dot(offset, part, input_precision="tf32x3")  # [BT, F]
        p_field = p_fields + (row * R + o_r) * 3
        which = tl.load(p_field, mask=m_r, other=0)
        shift = tl.load(p_field + 1, mask=m_r, other=0)
        width = tl.load(p_field + 2, mask=m_r, other=0)
        step = tl.load(p_steps + row * R + o_r, mask=m_r, other=1.0)
        half = (1 << tl.maximum(width - 1, 0)).to(tl.float32)
        scaled = tl.minimum(tl.maximum(z / step[None, :], -64.0), 64.0)
        code = tl.minimum(tl.maximum(tl.floor(scaled), -half[None, :]), half[None, :] - 1.0)
        coded = (width > 0)[None, :]
        residual = z - tl.where(coded, (code + 0.5) * step[None, :], 0.0)
        error += tl.sum(tl.where(m_r[None, :], residual * residual, 0.0), 1)
        bits = tl.where(coded, (code + half[None, :]).to(tl.int32) << shift[None, :], 0)
        sums = ()
        for w in tl.static_range(WORDS):
            sums = sums + (words[w] + tl.sum(tl.where((which == w)[None, :], bits, 0), 1),)
        words = sums
    for start in range(C, D, F):
        o_c = start + tl.arange(0, F)
        part = tl.load(basis + o_d[:, None] * D + o_c[None, :], mask=m_d[:, None] & (o_c < D)[None, :], other=0.0)
        rest = tl.dot(offset, part, input_precision="tf32x3")
        error += tl.sum(rest * rest, 1)
    p_code = p_codes + i_layer.to(tl.int64) * code_layer + h.to(tl.int64) * code_head
    for w in tl.static_range(WORDS):
        tl.store(p_code + slot * WORDS + w, words[w], mask=m_t)
    p_norm = p_norms + slot * 2 + i_layer.to(tl.int64) * norm_layer + h.to(tl.int64) * norm_head
    tl.store(p_norm, level_of(error), mask=m_t)
    tl.store(p_norm + 1, level_of(tl.sum(v * v, 1)), mask=m_t)
    if h == 0:
        tl.store(p_valid + i_layer.to(tl.int64) * valid_layer + slot, tl.full([BT], 1, tl.uint8), mask=m_t)
