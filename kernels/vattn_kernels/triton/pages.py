"""Page bounds of keys; the math is `vattn_kernels.reference.quest`."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.estimate import PAGE
from vattn_kernels.triton.update import level_of


@triton.jit
def mark_slots_fwd_kernel(
    p_v, p_new, p_norms, p_valid, num_new, k_stride, norm_slot, norm_head,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Norms of new values, and the valid bytes: a launch ahead of the bounds, which cover every valid slot."""
    h = tl.program_id(1)
    o_t, o_d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, DP)
    m_t = o_t < num_new
    slot = tl.load(p_new + o_t, mask=m_t, other=0)
    mask = m_t[:, None] & (o_d < D)[None, :]
    v = tl.load(p_v + slot[:, None] * k_stride + h * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(p_norms + slot * norm_slot + h.to(tl.int64) * norm_head, level_of(tl.sum(v * v, 1)), mask=m_t)
    if h == 0:
        tl.store(p_valid + slot, tl.full([BT], 1, tl.uint8), mask=m_t)


@triton.jit
def bound_pages_fwd_kernel(
    p_k, p_new, p_valid, p_bounds, num_slots, k_stride, page_stride, head_stride, D: tl.constexpr, DP: tl.constexpr
):
    """Bounds of one new slot's page, unless the slot before it is of the same page; equal pages store equal bounds."""
    i_new, h = tl.program_id(0), tl.program_id(1)
    page = tl.load(p_new + i_new) // PAGE
    before = tl.load(p_new + i_new - 1, mask=i_new > 0, other=-1)
    if (before < 0) | (before // PAGE != page):
        o_d = tl.arange(0, DP)
        m_d = o_d < D
        slot = page * PAGE + tl.arange(0, PAGE)
        member = tl.load(p_valid + slot, mask=slot < num_slots, other=0) != 0
        at = slot[:, None] * k_stride + h * D + o_d[None, :]
        k = tl.load(p_k + at, mask=member[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [PAGE, DP]
        p_own = p_bounds + page * page_stride + h.to(tl.int64) * head_stride + o_d
        least = tl.min(tl.where(member[:, None], k, float("inf")), 0)
        most = tl.max(tl.where(member[:, None], k, float("-inf")), 0)
        tl.store(p_own, least.to(p_bounds.dtype.element_ty), mask=m_d)
        tl.store(p_own + D, most.to(p_bounds.dtype.element_ty), mask=m_d)
