"""Untrained nets for selector ``hash``, in a file as HashAttention's authors write it."""

from __future__ import annotations

from pathlib import Path

import torch

HIDDEN, BITS = 48, 64


def hash_weights(path: Path, layers: int, num_qo_heads: int, head_dim: int) -> str:
    """Write the file; what a server takes as ``VATTN_HASH_WEIGHTS``."""
    shapes = (head_dim, HIDDEN), (HIDDEN, BITS)
    net = {
        f"{side}_{kind}": [torch.randn(num_qo_heads, *(s if kind == "matrix" else s[1:])) for s in shapes]
        for side in ("query", "key")
        for kind in ("matrix", "bias")
    }
    torch.save(dict.fromkeys(range(layers), net), path)
    return str(path)
