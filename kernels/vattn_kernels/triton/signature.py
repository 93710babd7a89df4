"""Signatures of keys and queries by nets; the math is `vattn_kernels.reference.signature`."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.triton.estimate import FIRST_WORD
from vattn_kernels.triton.update import level_of

# Rows of a tile: keys or queries. Columns of a tile of inputs or of a hidden layer.
ROWS = tl.constexpr(16)
COLUMNS = tl.constexpr(64)
WORD = tl.constexpr(32)


@triton.jit
def bias_of(p_layer, j, INNER: tl.constexpr, OUTER: tl.constexpr, WIDE: tl.constexpr):
    """Columns from ``j`` on of a layer whose inputs are all 0, ``[ROWS, WIDE]``."""
    column = tl.arange(0, WIDE) + j
    bias = tl.load(p_layer + INNER * OUTER + column, mask=column < OUTER, other=0.0)
    return tl.zeros([ROWS, WIDE], tl.float32) + bias[None, :]


@triton.jit
def add_product(acc, x, p_layer, i, j, INNER: tl.constexpr, OUTER: tl.constexpr, WIDE: tl.constexpr):
    """``acc`` plus what inputs ``x`` from ``i`` on, ``[ROWS, COLUMNS]``, give columns from ``j`` on."""
    row, column = tl.arange(0, COLUMNS) + i, tl.arange(0, WIDE) + j
    mask = (row < INNER)[:, None] & (column < OUTER)[None, :]
    matrix = tl.load(p_layer + row[:, None] * OUTER + column[None, :], mask=mask, other=0.0)
    return tl.dot(x, matrix, acc, input_precision="tf32x3")


@triton.jit
def first_layer(x, p_layer, j, INNER: tl.constexpr, OUTER: tl.constexpr, WIDE: tl.constexpr):
    """Columns from ``j`` on of the layer that takes the net's inputs ``x``, a tuple of tiles."""
    acc = bias_of(p_layer, j, INNER, OUTER, WIDE)
    for i in tl.static_range(len(x)):
        acc = add_product(acc, x[i], p_layer, i * COLUMNS, j, INNER, OUTER, WIDE)
    return acc


@triton.jit
def silu(x):
    """Activation between layers."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def words_of(x, p_net, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr):
    """Signs of a net's outputs, int32 ``[ROWS, 1, 2 or 4]``; a word behind the last output is 0.

    A hidden layer is made tile by tile, for wide ones fit no registers: the first anew for every tile of the second.
    In one stage, for the tiles of several would fill shared memory.

    Parameters
    ----------
    x : tuple of tensor
        float32 tiles ``[ROWS, COLUMNS]`` of the net's inputs.
    p_net : pointer
        Of one head's net, see `vattn_kernels.signature.pack`.
    FIRST, SECOND, LAST : int
        Widths of its layers; 0 for a hidden layer that there is not.
    """
    wide: tl.constexpr = 32 if LAST <= 32 else 64 if LAST <= 64 else 128
    if FIRST == 0:
        acc = first_layer(x, p_net, 0, D, LAST, wide)
    elif SECOND == 0:
        p_last = p_net + (D + 1) * FIRST
        acc = bias_of(p_last, 0, FIRST, LAST, wide)
        for i in tl.range(0, FIRST, COLUMNS, num_stages=1):
            hidden = silu(first_layer(x, p_net, i, D, FIRST, COLUMNS))
            acc = add_product(acc, hidden, p_last, i, 0, FIRST, LAST, wide)
    else:
        p_second = p_net + (D + 1) * FIRST
        p_last = p_second + (FIRST + 1) * SECOND
        acc = bias_of(p_last, 0, SECOND, LAST, wide)
        for j in tl.range(0, SECOND, COLUMNS, num_stages=1):
            hidden = bias_of(p_second, j, FIRST, SECOND, COLUMNS)
            for i in tl.range(0, FIRST, COLUMNS, num_stages=1):
                inner = silu(first_layer(x, p_net, i, D, FIRST, COLUMNS))
                hidden = add_product(hidden, inner, p_second, i, j, FIRST, SECOND, COLUMNS)
            acc = add_product(acc, silu(hidden), p_last, j, 0, SECOND, LAST, wide)
    signs = tl.reshape((acc > 0.0).to(tl.int32), [ROWS, wide // WORD, WORD])
    return tl.sum(signs << tl.arange(0, WORD)[None, None, :], 2)


@triton.jit
def store_words(p_word, words, mask, COUNT: tl.constexpr):
    """Store the first ``COUNT`` words of every row at its pointer."""
    o_w = tl.arange(0, words.shape[1])
    tl.store(p_word[:, None] + o_w[None, :], words, mask=mask[:, None] & (o_w < COUNT)[None, :])


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
    store_words(p_word, words, m_t, LAST // WORD)


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
    p_word = p_codes + slot * row_stride + h.to(tl.int64) * code_head + i_net * (LAST // WORD)
    store_words(p_word, words, m_t, LAST // WORD)
    if i_net == 0:
        tl.store(p_norms + slot * norm_slot + h.to(tl.int64) * norm_head, level_of(square), mask=m_t)
        if h == 0:
            tl.store(p_valid + slot, tl.full([ROWS], 1, tl.uint8), mask=m_t)
