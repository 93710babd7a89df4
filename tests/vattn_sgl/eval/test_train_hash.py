"""Nets trained for selector ``hash``: they find the best keys, fit the format, and are made once."""

from __future__ import annotations

import torch

from vattn_kernels import signature
from vattn_sgl.eval import selectors, train_hash

TOKENS, QO_HEADS, KV_HEADS, HEAD_DIM = 1400, 4, 2, 16


def text(seed):
    """Queries and keys around far-off means, of which a few directions matter."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(9)) / HEAD_DIM**0.5
    q, k = (torch.randn(TOKENS, heads, HEAD_DIM, generator=g) @ mix for heads in (QO_HEADS, KV_HEADS))
    return 3 * q + 2, 3 * k - 4


def recall(nets, q, k):
    """Share of the 32 best keys of the last queries among the 128 that agree most, per query head."""
    query, query_widths = signature.pack(nets["query_matrix"], nets["query_bias"])
    key, key_widths = signature.pack(nets["key_matrix"], nets["key_bias"])
    found = []
    for h in range(QO_HEADS):
        kv = h // (QO_HEADS // KV_HEADS)
        ours = torch.sign(signature.outputs(q[-32:, h], query[h], query_widths.tolist()))
        theirs = torch.sign(signature.outputs(k[:-32, kv], key[kv], key_widths.tolist()))
        best = (q[-32:, h] @ k[:-32, kv].T).topk(32).indices
        chosen = (ours @ theirs.T).topk(128).indices
        found.append((best[:, :, None] == chosen[:, None]).any(-1).float().mean())
    return torch.stack(found)


def test_training_finds_the_best_keys_of_another_text_and_is_deterministic():
    q, k = text(0)
    trained, again = (train_hash.train_layer(q, k, 150, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for name in trained for a, b in zip(trained[name], again[name], strict=True))
    untrained = train_hash.train_layer(q, k, 0, seed=1)
    after, before = (recall(nets, *text(1)) for nets in (trained, untrained))
    print("recall", before, after)
    assert (after > before + 0.2).all()


def test_weights_fit_the_model_and_are_made_once(small, monkeypatch, tmp_path):
    monkeypatch.setattr(train_hash, "KEYS", 128)
    monkeypatch.setenv("VATTN_CACHE", str(tmp_path))
    tokens = small.tokens[:400]
    file = train_hash.weights(tmp_path / "model", small.model, small.geometry, tokens, 3)
    nets = selectors.load_nets(small.geometry, file)
    assert [n.bits for n in nets] == [train_hash.BITS] * small.geometry.num_layers
    assert nets[0].key.shape[0] == small.geometry.num_kv_heads
    monkeypatch.setattr(train_hash, "observe", None)
    assert train_hash.weights(tmp_path / "model", small.model, small.geometry, tokens, 3) == file
