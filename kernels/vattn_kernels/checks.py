"""Checks of arguments that the CPU's and the GPU's ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from vattn_kernels.quantiles import TARGETS

SAMPLERS = ("proportional", "uniform")
GROUP_SCORES = ("max", "mean")
MAX_GROUP = 16
# Of a cache that GPU kernels read beside queries of two bytes.
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def require(condition: bool, message: str, *values: object) -> None:
    """Raise unless ``condition`` holds.

    Parameters
    ----------
    condition : bool
        What is expected.
    message : str
        What was wrong and what was expected, with ``{}`` for each of ``values``: an op checks some twenty conditions a
        layer and step, so a message is put together only where it is raised.
    *values : object
        Of the message.

    Raises
    ------
    ValueError
        With the message.
    """
    if not condition:
        raise ValueError("vattn: " + message.format(*values))


def check_cache(k_cache: Tensor, v_cache: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a KV cache of another layout than ``[slots, num_kv_heads, head_dim]`` in one of ``dtypes``."""
    dtype, shape = k_cache.dtype, k_cache.shape
    require(dtype in dtypes, "the KV cache is {}, expected one of {}", dtype, dtypes)
    require(dtype == v_cache.dtype, "k_cache is {} but v_cache is {}", dtype, v_cache.dtype)
    require(shape == v_cache.shape, "k_cache has shape {}, v_cache {}; expected one shape", shape, v_cache.shape)
    require(k_cache.is_contiguous() and v_cache.is_contiguous(), "k_cache and v_cache must be contiguous")


def check_decode(
    q: Tensor, k_cache: Tensor, kv_indices: Tensor, seq_lens: Tensor, out: Tensor, stats: Tensor, target: str
) -> None:
    """Refuse arguments of ``decode`` that no device serves."""
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    head_dim = k_cache.shape[2]
    require(q.shape[2] == head_dim, "q has head_dim {}, the KV cache {}; expected one head_dim", q.shape[2], head_dim)
    require(
        q.dtype == out.dtype and k_cache.dtype in (q.dtype, *FP8_DTYPES),
        "q is {}, out {}, the KV cache {}; expected one dtype",
        *(q.dtype, out.dtype, k_cache.dtype),
    )
    require(
        heads % kv_heads == 0 and heads // kv_heads <= MAX_GROUP,
        "{} query heads over {} KV heads: the group must be whole and at most {}",
        *(heads, kv_heads, MAX_GROUP),
    )
    require(q.is_contiguous() and out.is_contiguous() and stats.is_contiguous(), "q, out and stats must be contiguous")
    require(
        kv_indices.dtype == torch.int32 and kv_indices.stride(1) == 1,
        "kv_indices must be int32 with unit stride along positions, got {} and strides {}",
        *(kv_indices.dtype, kv_indices.stride()),
    )
    require(seq_lens.dtype in (torch.int32, torch.int64), "seq_lens must be int32 or int64, got {}", seq_lens.dtype)
    require(target in TARGETS, "target {!r} is unknown, expected one of {}", target, TARGETS)
