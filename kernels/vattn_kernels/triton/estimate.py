"""Selectors other than ``sketch``: what ``select`` needs of a query, and the estimated logits of a block of tokens.

``oracle`` and ``quest`` weigh a row of numbers a token, its key or its page's bounds; ``sign`` and ``hash`` compare
signatures. The math is `vattn_kernels.reference.quest` and `vattn_kernels.reference.signature`; scores that a cap cuts
are neither ranked nor shrunk here, as the CPU's are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn_kernels.line import LEVEL as LINE_LEVEL
from vattn_kernels.line import LINE_WIDTH as WIDTH_OF_LINE
from vattn_kernels.line import OFFSET as LINE_OFFSET
from vattn_kernels.line import SLOPE as LINE_SLOPE
from vattn_kernels.ops import SELECTORS
from vattn_kernels.pages import PAGE as SLOTS_A_PAGE
from vattn_kernels.sketch import NORM_STEPS_PER_OCTAVE, NORM_ZERO
from vattn_kernels.triton.layout import LISTS, LOG2E, REPEATS, RUN

SKETCH = tl.constexpr(SELECTORS.index("sketch"))
ORACLE = tl.constexpr(SELECTORS.index("oracle"))
QUEST = tl.constexpr(SELECTORS.index("quest"))
SIGN = tl.constexpr(SELECTORS.index("sign"))
HASH = tl.constexpr(SELECTORS.index("hash"))
LEVEL = tl.constexpr(LINE_LEVEL)
SLOPE = tl.constexpr(LINE_SLOPE)
OFFSET = tl.constexpr(LINE_OFFSET)
LINE_WIDTH = tl.constexpr(WIDTH_OF_LINE)
PAGE = tl.constexpr(SLOTS_A_PAGE)
STEPS_PER_OCTAVE = tl.constexpr(NORM_STEPS_PER_OCTAVE)
ZERO = tl.constexpr(NORM_ZERO)
# Entries of a query's row of ``work.query`` for signatures: factors of agreement and of norm, then the words.
AGREEMENT = tl.constexpr(0)
CONSTANT = tl.constexpr(1)
FIRST_WORD = tl.constexpr(2)
# Heads of a tensor-core tile: the largest group.
TILE = tl.constexpr(16)
# Numbers of a token's row that are multiplied at once.
STEP = tl.constexpr(32)
PI = tl.constexpr(3.141592653589793)


@triton.jit
def describe_query(
    q, head, m_g, h, p_mean, p_line, p_query, p_bias, sm_scale,
    D: tl.constexpr, DP: tl.constexpr, SELECTOR: tl.constexpr,
):  # fmt: skip
    """Store the factors of a group's heads, from its queries ``[GP, DP]``; words come from `signature`."""
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    wide = q.to(tl.float32)
    p_row = p_query + head * (2 * D)
    p_weight = p_row[:, None] + o_d[None, :]
    mask = m_g[:, None] & m_d[None, :]
    if SELECTOR == ORACLE:
        tl.store(p_weight, wide, mask=mask)
        tl.store(p_bias + head, tl.sum(wide, 1) * 0.0, mask=m_g)
    else:
        mean = tl.load(p_mean + h * D + o_d, mask=m_d, other=0.0)
        base = sm_scale * tl.sum(wide * mean[None, :], 1)
        p_own = p_line + h * LINE_WIDTH
        level, slope, offset = tl.load(p_own + LEVEL), tl.load(p_own + SLOPE), tl.load(p_own + OFFSET)
        if SELECTOR == QUEST:
            # Of the bounds' middle and half width, weighed by slope and offset: factors of either bound.
            middle, half = 0.5 * slope * wide, 0.5 * offset * tl.abs(wide)
            tl.store(p_weight, middle - half, mask=mask)
            tl.store(p_weight + D, middle + half, mask=mask)
            tl.store(p_bias + head, level + base - slope * base, mask=m_g)
        else:
            unit = sm_scale * tl.sqrt(tl.sum(wide * wide, 1))
            tl.store(p_row + AGREEMENT, slope * unit, mask=m_g)
            tl.store(p_row + CONSTANT, offset * unit, mask=m_g)
            tl.store(p_bias + head, level + base, mask=m_g)


@triton.jit
def population(x, FAST: tl.constexpr):
    """Number of set bits of an int32."""
    if FAST:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def agreement_of(differing, BITS: tl.constexpr, ANGULAR: tl.constexpr):
    """Similarity in [-1, 1], `vattn_kernels.signature.agreement`."""
    x = 1.0 - differing.to(tl.float32) * (2.0 / BITS)
    if ANGULAR:
        # sin(pi x / 2) for x in [-1, 1], to 4e-6.
        t = x * (0.5 * PI)
        s = t * t
        x = t * (1.0 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880)))))
    return x


@triton.jit
def largest(scores, G: tl.constexpr):
    """The largest of a group's scores."""
    best = scores[0]
    for g in tl.static_range(1, G):
        best = tl.maximum(best, scores[g])
    return best


@triton.jit
def signature_scores(
    slot, p_codes, p_norms, p_query, p_bias, p_log_scale, i_row, row_stride,
    G: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, OWN_WORDS: tl.constexpr, SELECTOR: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Each head's scaled logit, in nats, from signatures of ``OWN_WORDS``, one for all heads or one for each.

    Parameters
    ----------
    slot : tensor
        int32, of any shape.
    p_codes, p_norms : pointer
        Of this KV head; norms of a head lie side by side.
    """
    each: tl.constexpr = WORDS // OWN_WORDS
    norm = tl.exp2((tl.load(p_norms + slot).to(tl.float32) - ZERO) * (1.0 / STEPS_PER_OCTAVE))
    p_code = p_codes + slot.to(tl.int64) * row_stride
    # With one signature for each head a turn has one head, so they come in order.
    scores = ()
    for e in tl.static_range(each):
        words = ()
        for w in tl.static_range(OWN_WORDS):
            words = words + (tl.load(p_code + e * OWN_WORDS + w),)
        for g in tl.static_range(e, G, each):
            head = i_row * G + g
            p_own = p_query + head * (2 * D)
            p_word = (p_own + FIRST_WORD).to(tl.pointer_type(tl.int32))
            differing = population(words[0] ^ tl.load(p_word), FAST)
            for w in tl.static_range(1, OWN_WORDS):
                differing += population(words[w] ^ tl.load(p_word + w), FAST)
            similar = agreement_of(differing, 32 * OWN_WORDS, SELECTOR == SIGN)
            level = tl.load(p_bias + head) + tl.load(p_log_scale + head)
            scores = scores + (level + norm * (tl.load(p_own + AGREEMENT) * similar + tl.load(p_own + CONSTANT)),)
    return scores


@triton.jit
def scores_of_slots(
    slot, p_rows, p_v, p_query, p_bias, p_log_scale, i_row, sm_scale, row_stride,
    G: tl.constexpr, D: tl.constexpr, SELECTOR: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """Each head's scaled logit, in nats, and log of \\|v\\|, of few tokens anywhere; `row_scores` is for whole blocks.

    Parameters
    ----------
    slot : tensor
        int32, of any shape.
    p_rows, p_v : pointer
        Keys or page bounds, and values, of this KV head.
    """
    row = slot // PAGE if SELECTOR == QUEST else slot
    at = row.to(tl.int64) * row_stride
    square = at.to(tl.float32) * 0.0
    products = ()
    for _ in tl.static_range(G):
        products = products + (square,)
    for d in range(2 * D if SELECTOR == QUEST else D):
        number = tl.load(p_rows + at + d).to(tl.float32)
        grown = ()
        for g in tl.static_range(G):
            grown = grown + (products[g] + number * tl.load(p_query + (i_row * G + g) * (2 * D) + d),)
        products = grown
        if (SELECTOR == ORACLE) & WITH_VALUES:
            v = tl.load(p_v + at + d).to(tl.float32)
            square += v * v
    scores = ()
    for g in tl.static_range(G):
        level = tl.load(p_bias + i_row * G + g) + tl.load(p_log_scale + i_row * G + g)
        score = products[g] * sm_scale + level
        if (SELECTOR == ORACLE) & WITH_VALUES:
            score += (0.5 / LOG2E) * tl.log2(tl.maximum(square, 1e-37))
        scores = scores + (score,)
    return scores


@triton.jit
def row_scores(
    start, high, p_rows, p_v, p_indices, p_query, p_bias, p_log_scale, i_row, sm_scale, row_stride,
    G: tl.constexpr, D: tl.constexpr, SELECTOR: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """Largest scaled logit of the group, in nats, and log of \\|v\\|, of the block of tokens that begins at ``start``.

    Parameters
    ----------
    p_rows, p_v : pointer
        Keys or page bounds, and values, of this KV head.
    """
    tl.static_assert(REPEATS == 4, "four runs are joined")
    runs = ()
    for r in tl.static_range(REPEATS):
        runs = runs + (
            run_scores(
                start + r * (LISTS * RUN), high, p_rows, p_v, p_indices, p_query, p_bias, p_log_scale, i_row, sm_scale,
                row_stride, G, D, SELECTOR, WITH_VALUES,
            ),
        )  # fmt: skip
    joined = tl.join(tl.join(runs[0], runs[2]), tl.join(runs[1], runs[3]))
    return tl.permute(tl.reshape(joined, [LISTS, RUN, REPEATS]), (1, 0, 2))


@triton.jit
def run_scores(
    start, high, p_rows, p_v, p_indices, p_query, p_bias, p_log_scale, i_row, sm_scale, row_stride,
    G: tl.constexpr, D: tl.constexpr, SELECTOR: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """`row_scores` of one run of every list; tokens of a page load the same row together, and so share its transfer."""
    length: tl.constexpr = 2 * D if SELECTOR == QUEST else D
    o_n = tl.arange(0, LISTS * RUN)
    o_g = tl.arange(0, TILE)
    m_g = o_g < G
    o_d = tl.arange(0, STEP)
    head = i_row * G + o_g
    # Behind the end slot 0 is read and not chosen.
    row = tl.load(p_indices + start + o_n, mask=start + o_n < high, other=0)
    if SELECTOR == QUEST:
        row = row // PAGE
    at = row.to(tl.int64)[:, None] * row_stride + o_d[None, :]
    acc = tl.zeros([LISTS * RUN, TILE], tl.float32)
    square = tl.zeros([LISTS * RUN, STEP], tl.float32)
    for d in tl.range(0, length, STEP, num_stages=1, loop_unroll_factor=1):
        rows = tl.load(p_rows + at + d)  # [N, STEP]
        weight = tl.load(p_query + head[None, :] * (2 * D) + (d + o_d)[:, None], mask=m_g[None, :], other=0.0)
        rounded = weight.to(rows.dtype)
        acc = tl.dot(rows, rounded, acc, input_precision="ieee")
        if SELECTOR == QUEST:
            # Factors of bounds are no numbers of the cache's type; what rounding leaves of them counts too.
            acc = tl.dot(rows, (weight - rounded.to(tl.float32)).to(rows.dtype), acc, input_precision="ieee")
        if (SELECTOR == ORACLE) & WITH_VALUES:
            v = tl.load(p_v + at + d).to(tl.float32)
            square += v * v
    level = tl.load(p_bias + head, mask=m_g, other=0.0) + tl.load(p_log_scale + head, mask=m_g, other=0.0)
    level = tl.where(m_g, level, float("-inf"))
    score = tl.max(acc * sm_scale + level[None, :], 1)
    if (SELECTOR == ORACLE) & WITH_VALUES:
        score += (0.5 / LOG2E) * tl.log2(tl.maximum(tl.sum(square, 1), 1e-37))
    return score
