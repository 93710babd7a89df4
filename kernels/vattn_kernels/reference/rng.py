"""Keyed random numbers: a uniform per token and a permutation of the range, both pure functions of their key."""

from __future__ import annotations

import torch

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B1
INCREMENT = 0x7F4A7C15
ROUNDS = 4


def scramble(x: torch.Tensor) -> torch.Tensor:
    """`mix` up to its last step, which leaves the upper half as it is."""
    x = x & WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & WORD
    x = x ^ (x >> 15)
    # The product exceeds 63 bits; int64 arithmetic wraps, and the low 32 bits stay right.
    return (x * 0x846CA68B) & WORD


def mix(x: torch.Tensor) -> torch.Tensor:
    """Two-multiply 32-bit hash of an int64 tensor that holds unsigned 32-bit values."""
    x = scramble(x)
    return x ^ (x >> 16)


def stream_key(seed: int, layer: int, head: int, n: int) -> int:
    """Key of one (layer, KV head, step); steps are independent because ``n`` counts the tokens in the cache."""
    x = torch.tensor(seed & WORD)
    for part in (layer, head, n):
        x = mix((x ^ ((part * GOLDEN) & WORD)) + INCREMENT)
    return int(x)


def uniform(positions: torch.Tensor, key: int) -> torch.Tensor:
    """``u_i`` in [0, 1) with 23 bits, as many as a float32's fraction holds, float64, for int64 positions.

    So a token is read with its probability rounded up to a multiple of ``2^-23``, by 1 % or more below 1.2e-5.
    """
    return (scramble(positions * GOLDEN + key) >> 9).double() * 2.0**-23


def permutation(n: int, key: int) -> torch.Tensor:
    """Keyed permutation of ``[0, n)``: a balanced Feistel network with cycle walking.

    Parameters
    ----------
    n : int
        Length, at least 1.
    key : int
        From `stream_key`.

    Returns
    -------
    torch.Tensor
        int64 ``[n]``; its prefixes are the nested samples without replacement.
    """
    half = 1
    while 4**half < n:
        half += 1
    mask = (1 << half) - 1
    x = torch.arange(n)
    pending = torch.ones(n, dtype=torch.bool)
    while pending.any():
        left, right = x[pending] >> half, x[pending] & mask
        for r in range(ROUNDS):
            left, right = right, (left ^ mix(right + key + r * GOLDEN)) & mask
        x[pending] = (left << half) | right
        pending = x >= n
    return x
