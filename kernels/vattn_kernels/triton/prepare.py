"""Stage ``prepare``: the query as the selector reads it, the fixed set's mass, the predicted scale."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.estimate import SKETCH, describe_query
from vattn_kernels.triton.layout import (
    CODE_BITS,
    CODING,
    DENSE,
    FLOOR,
    LOG2E,
    NUM_SCALES,
    SAMPLED,
    STATE_CONTEXT,
    STATE_READS,
    STATE_SCALE,
    UNIT,
    await_last,
    begin_next,
    is_padding,
    sampled_range,
)

LEAST_CODING = tl.constexpr(1e-6)
# Nats; a log-scale of a thousand of them must fit 32 bits.
LEAST_STEP = tl.constexpr(1e-6)
# Half of what a byte counts.
HALF_RANGE = tl.constexpr(float(1 << (CODE_BITS.value - 1)))
# Bits of a float32 that tf32 keeps.
TF32 = tl.constexpr(-(1 << 13))


@triton.jit
def prepare_fwd_kernel(
    p_q, p_k, p_kv_indices, p_seq_lens, p_mean, p_query_basis, p_steps, p_fields, p_covered, p_state, p_state_rows,
    p_mode, p_codes, p_query, p_bias, p_log_scale, p_fixed, p_scale, p_listed, p_attended,
    sm_scale, k_scale, floor, sink, window, dense_below, pilot_min, kv_stride, k_stride,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, CODES: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, MOST_AGE: tl.constexpr,
    SELECTOR: tl.constexpr, UNIFORM: tl.constexpr, SIGNALS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Two programs a row, because neither half waits for the other: the fixed set with the mode, and the query."""
    # What comes next loads before it waits what a step only reads, and what is not ours may still write it.
    await_last(DEPENDENT)
    begin_next(DEPENDENT)
    i_row = tl.program_id(0) // 2
    b, h = i_row // HKV, i_row % HKV
    n = tl.load(p_seq_lens + b).to(tl.int32)
    low, high = sampled_range(n, sink, window)
    total = high - low
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    head = i_row * G + o_g
    state = p_state + (tl.load(p_state_rows + b) * HKV * G + h * G + o_g) * WIDTH
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    p_own_q = p_q + head[:, None] * D + o_d[None, :]
    m_q = m_g[:, None] & m_d[None, :]
    # Each half loads what it can before it waits for any of it.
    if tl.program_id(0) % 2 == 0:
        tl.store(p_listed + i_row * SIGNALS + tl.arange(0, SIGNALS), 0)
        tl.store(p_attended + i_row, 0)
        q = tl.load(p_own_q, mask=m_q, other=0.0)  # [GP, DP]
        learnt = tl.load(state + STATE_CONTEXT, mask=m_g, other=1.0)
        scale = tl.load(state + STATE_SCALE, mask=m_g, other=0.0)
        covered = tl.load(p_covered)
        top = tl.full([GP], float("-inf"), tl.float32)
        mass = tl.zeros([GP], tl.float32)
        fixed_tokens = n - total
        # A loop in stages would copy the slots through shared memory, one more wait, and mostly there is one pass.
        for start in tl.range(0, fixed_tokens, F, num_stages=1):
            index = start + tl.arange(0, F)
            m_f = index < fixed_tokens
            position = tl.where(index < low, index, index + total)
            slot = tl.load(p_kv_indices + b.to(tl.int64) * kv_stride + position, mask=m_f, other=0).to(tl.int64)
            k = tl.load(
                p_k + slot[:, None] * k_stride + h * D + o_d[None, :], mask=m_f[:, None] & m_d[None, :], other=0.0
            )  # [F, DP]
            logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (sm_scale * k_scale)
            logits = tl.where(m_f[None, :], logits, float("-inf"))
            larger = tl.maximum(top, tl.max(logits, 1))
            mass = mass * tl.exp(top - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
            top = larger
        fixed = top + tl.log(tl.maximum(mass, 1e-30))
        tl.store(p_fixed + head, fixed, mask=m_g)
        tl.store(p_log_scale + head, scale - fixed, mask=m_g)
        age = n - learnt.to(tl.int32)
        known = tl.min(((learnt > 0) & (age >= 0) & (age <= MOST_AGE) | (o_g >= G)).to(tl.int32), 0)
        sampled = (n >= dense_below) & (n <= covered) & (total > 2 * pilot_min) & (known > 0)
        # A padded row goes through the first round with nothing listed, so that `finish` finds nothing to do.
        ends_early = is_padding(n) & (not UNIFORM)
        tl.store(p_mode + i_row, tl.where(sampled | ends_early, SAMPLED, DENSE))
    elif SELECTOR != SKETCH:
        q = tl.load(p_own_q, mask=m_q, other=0.0)
        reads = tl.max(tl.load(state + STATE_READS, mask=m_g, other=0.0), 0)
        least = floor * tl.maximum(reads, 1.0) / tl.maximum(total, 1).to(tl.float32)
        tl.store(p_scale + i_row * NUM_SCALES + FLOOR, least)
        describe_query(q, head, m_g, h, p_mean, p_steps, p_query, p_bias, sm_scale, D, DP, SELECTOR)
    else:
        o_r = tl.arange(0, C)
        m_r = o_r < R
        step = tl.load(p_steps + h * R + o_r, mask=m_r, other=0.0)
        field_width = tl.load(p_fields + (h * R + o_r) * 3 + 2, mask=m_r, other=0)
        mean = tl.load(p_mean + h * D + o_d, mask=m_d, other=0.0)
        basis = p_query_basis + h * D * D
        first = tl.load(basis + o_d[:, None] * D + o_r[None, :], mask=m_d[:, None] & m_r[None, :], other=0.0)
        qf = tl.load(p_own_q, mask=m_q, other=0.0).to(tl.float32)
        reads = tl.load(state + STATE_READS, mask=m_g, other=0.0)
        # Else the compiler waits for some of it before it asks for the rest.
        tl.debug_barrier()
        # A query of 16 bits is exact in tf32, so two products give all bits of the table but the last.
        upper = (first.to(tl.int32, bitcast=True) & TF32).to(tl.float32, bitcast=True)
        t = tl.dot(qf, upper, input_precision="tf32")  # [GP, C]
        t = tl.dot(qf, first - upper, t, input_precision="tf32")
        # Codes are read as the upper bits of bytes, so that a step has so many ones.
        ones = (1 << (-field_width + CODE_BITS)).to(tl.float32)
        weight = t * tl.where(field_width > 0, sm_scale * step / ones, 0.0)[None, :]
        unit = tl.maximum(tl.max(tl.max(tl.abs(weight), 1), 0) / 127.0, LEAST_STEP)
        code = tl.floor(weight / unit + 0.5)
        # Half a step above the code; the least code stands for half of all steps below zero.
        centre = 0.5 * ones - HALF_RANGE
        bias = sm_scale * tl.sum(qf * mean[None, :], 1) + unit * tl.sum(code * centre[None, :], 1)
        tl.store(
            p_codes + head[:, None] * CODES + o_r[None, :], code.to(tl.int8), mask=m_g[:, None] & (o_r < CODES)[None, :]
        )
        tl.store(p_bias + head, bias, mask=m_g)
        # Queries are white in these coordinates, so the coded ones tell the energy of the rest.
        kappa = 0.5 * sm_scale * sm_scale * tl.sum(tl.sum(t * t, 1), 0) / (G * C)
        p_own = p_scale + i_row * NUM_SCALES
        tl.store(p_own + UNIT, unit)
        tl.store(p_own + CODING, tl.maximum(kappa * LOG2E, LEAST_CODING))
        least = floor * tl.maximum(tl.max(reads, 0), 1.0) / tl.maximum(total, 1).to(tl.float32)
        tl.store(p_own + FLOOR, least)
