"""Signatures of keys and queries by nets; the math is `vattn_kernels.reference.signature`."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.estimate import FIRST_WORD
from vattn_kernels.triton.update import level_of

# Rows of a tile: keys or queries; columns of a tile of a hidden layer, and of a word.
ROWS = tl.constexpr(16)
COLUMNS = tl.constexpr(64)
BITS = tl.constexpr(32)


def warps_of(*widths: int) -> int:
    """Warps that hold the tiles of a net's widest layer."""
    return 4 if max(widths) <= 128 else 8


@triton.jit
def layer_of_net(x, p_layer, INNER: tl.constexpr, OUTER: tl.constexpr, WIDE: tl.constexpr):
    """One linear layer: tiles ``[ROWS, COLUMNS]`` of ``INNER`` columns in all to tiles of ``WIDE`` columns."""
    o_i, o_o = tl.arange(0, COLUMNS), tl.arange(0, WIDE)
    outs = ()
    for j in tl.static_range(0, OUTER, WIDE):
        m_o = j + o_o < OUTER
        acc = tl.zeros([ROWS, WIDE], tl.float32)
        for i in tl.static_range(0, INNER, COLUMNS):
            at = (i + o_i)[:, None] * OUTER + (j + o_o)[None, :]
            matrix = tl.load(p_layer + at, mask=(i + o_i < INNER)[:, None] & m_o[None, :], other=0.0)
            acc = tl.dot(x[i // COLUMNS], matrix, acc, input_precision="tf32x3")
        bias = tl.load(p_layer + INNER * OUTER + j + o_o, mask=m_o, other=0.0)
        outs = outs + (acc + bias[None, :],)
    return outs


@triton.jit
def activated(x):
    """SiLU of every tile."""
    outs = ()
    for i in tl.static_range(len(x)):
        outs = outs + (x[i] / (1.0 + tl.exp(-x[i])),)
    return outs


@triton.jit
def words_of(x, p_net, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr):
    """Signs of a net's outputs, one int32 ``[ROWS]`` for 32 of them.

    Parameters
    ----------
    x : tuple of tensor
        float32 tiles ``[ROWS, COLUMNS]`` of the net's inputs.
    p_net : pointer
        Of one head's net, see `vattn_kernels.signature.pack`.
    FIRST, SECOND, LAST : int
        Widths of its layers; 0 for a hidden layer that there is not.
    """
    if FIRST == 0:
        outs = layer_of_net(x, p_net, D, LAST, BITS)
    else:
        x = activated(layer_of_net(x, p_net, D, FIRST, COLUMNS))
        p_net += (D + 1) * FIRST
        if SECOND == 0:
            outs = layer_of_net(x, p_net, FIRST, LAST, BITS)
        else:
            x = activated(layer_of_net(x, p_net, FIRST, SECOND, COLUMNS))
            outs = layer_of_net(x, p_net + (FIRST + 1) * SECOND, SECOND, LAST, BITS)
    words = ()
    for i in tl.static_range(len(outs)):
        words = words + (tl.sum((outs[i] > 0.0).to(tl.int32) << tl.arange(0, BITS)[None, :], 1),)
    return words


@triton.jit
def sign_queries_fwd_kernel(
    p_q, p_nets, p_query, batch, parameters,
    HQ: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Words of one head's queries, behind the factors that ``prepare`` stores."""
    i_block, head = tl.program_id(0), tl.program_id(1)
    o_t, o_c = i_block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_t = o_t < batch
    x = ()
    for d in tl.static_range(0, D, COLUMNS):
        at = (o_t * HQ + head)[:, None] * D + (d + o_c)[None, :]
        tile = tl.load(p_q + at, mask=m_t[:, None] & (d + o_c < D)[None, :], other=0.0)
        x = x + (tile.to(tl.float32),)
    words = words_of(x, p_nets + head.to(tl.int64) * parameters, D, FIRST, SECOND, LAST)
    p_word = (p_query + (o_t * HQ + head) * (2 * D) + FIRST_WORD).to(tl.pointer_type(tl.int32))
    for w in tl.static_range(len(words)):
        tl.store(p_word + w, words[w], mask=m_t)


@triton.jit
def sign_keys_fwd_kernel(
    p_k, p_new, p_mean, p_nets, p_codes, p_norms, p_valid,
    num_new, parameters, k_stride, row_stride, code_head, norm_slot, norm_head,
    EACH: tl.constexpr, CENTRED: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Words of new keys by one of the ``EACH`` nets of a KV head; the first one's also stores norm and valid byte."""
    i_block, h, i_net = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t, o_c = i_block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_t = o_t < num_new
    slot = tl.load(p_new + o_t, mask=m_t, other=0)
    x = ()
    square = tl.zeros([ROWS], tl.float32)
    for d in tl.static_range(0, D, COLUMNS):
        m_d = d + o_c < D
        mask = m_t[:, None] & m_d[None, :]
        key = tl.load(p_k + slot[:, None] * k_stride + h * D + (d + o_c)[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + h * D + d + o_c, mask=m_d, other=0.0)
        offset = tl.where(mask, key - mean[None, :], 0.0)
        square += tl.sum(offset * offset, 1)
        if CENTRED:
            key = offset
        x = x + (key,)
    words = words_of(x, p_nets + (h * EACH + i_net).to(tl.int64) * parameters, D, FIRST, SECOND, LAST)
    p_word = p_codes + slot * row_stride + h.to(tl.int64) * code_head + i_net * len(words)
    for w in tl.static_range(len(words)):
        tl.store(p_word + w, words[w], mask=m_t)
    if i_net == 0:
        tl.store(p_norms + slot * norm_slot + h.to(tl.int64) * norm_head, level_of(square), mask=m_t)
        if h == 0:
            tl.store(p_valid + slot, tl.full([ROWS], 1, tl.uint8), mask=m_t)
