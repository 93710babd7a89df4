"""What the tests of the selectors share: a real pool of SGLang, weights of a hash, one forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

NUM_SLOTS, NUM_LAYERS, NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM = 901, 2, 2, 4, 16


@pytest.fixture
def pool():
    """A pool with random K and V."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    made = MHATokenToKVPool(
        size=NUM_SLOTS - 1,
        page_size=1,
        dtype=torch.float32,
        head_num=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        layer_num=NUM_LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    # The other way is a Triton kernel.
    made.use_native_move_kv_cache = True
    for layer in range(NUM_LAYERS):
        for buffer in made.get_kv_buffer(layer):
            buffer.normal_(generator=torch.Generator().manual_seed(layer))
    return made


def hash_layers(bits=64, hidden=24, key_heads=NUM_QO_HEADS, layers=NUM_LAYERS):
    """Weights of two-layer nets in the authors' format."""
    g = torch.Generator().manual_seed(7)

    def net(heads):
        shapes = [(HEAD_DIM, hidden), (hidden, bits)]
        return [torch.randn(heads, *s, generator=g) for s in shapes], [0.1 * torch.randn(heads, s[1]) for s in shapes]

    weights = {}
    for layer in range(layers):
        (query, query_bias), (key, key_bias) = net(NUM_QO_HEADS), net(key_heads)
        weights[layer] = {"query_matrix": query, "query_bias": query_bias, "key_matrix": key, "key_bias": key_bias}
    return weights


@pytest.fixture
def hash_file(tmp_path: Path) -> str:
    """A file of `hash_layers`."""
    path = tmp_path / "weights.pt"
    torch.save(hash_layers(), path)
    return str(path)
