"""CPU prefill against attention in float64, one query at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vattn_sgl.cpu.prefill import CpuPrefill, causal_mask

PREFIXES_AND_NEWS = [
    pytest.param([(0, 63)], id="whole"),
    pytest.param([(111, 1)], id="one-token"),
    pytest.param([(100, 63)], id="chunk"),
    pytest.param([(0, 1)], id="first-token"),
    pytest.param([(0, 17), (33, 8), (64, 1), (5, 40)], id="mixed"),
]


def exact(q, k_cache, v_cache, slots, prefix, scale):
    group = q.shape[1] // k_cache.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for i in range(q.shape[0]):
        seen = slots[: prefix + i + 1].long()
        for h in range(q.shape[1]):
            k, v = k_cache[seen, h // group].double(), v_cache[seen, h // group].double()
            out[i, h] = torch.softmax(scale * k @ q[i, h].double(), 0) @ v
    return out


@pytest.mark.parametrize("requests", PREFIXES_AND_NEWS)
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), [(9, 3), (4, 1), (2, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_against_float64(requests, num_qo_heads, num_kv_heads, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    head_dim, most = 16, 200
    total = sum(prefix + new for prefix, new in requests)
    k_cache, v_cache = (torch.randn(total + 5, num_kv_heads, head_dim, generator=g).to(dtype) for _ in range(2))
    order = torch.randperm(total + 5, generator=g)
    req_to_token = torch.zeros(len(requests) + 2, most, dtype=torch.int32)
    rows = torch.arange(len(requests)) + 1
    used = 0
    for row, (prefix, new) in zip(rows, requests, strict=True):
        req_to_token[row, : prefix + new] = order[used : used + prefix + new].int()
        used += prefix + new
    q = torch.randn(sum(new for _, new in requests), num_qo_heads, head_dim, generator=g).to(dtype)
    batch = SimpleNamespace(
        req_pool_indices=rows,
        extend_prefix_lens_cpu=[prefix for prefix, _ in requests],
        extend_seq_lens_cpu=[new for _, new in requests],
    )
    prefill = CpuPrefill()
    out = torch.full_like(q, float("nan"))
    prefill.run(q, k_cache, v_cache, prefill.build(batch, req_to_token), 0.25, out)
    start = 0
    for row, (prefix, new) in zip(rows, requests, strict=True):
        expected = exact(q[start : start + new], k_cache, v_cache, req_to_token[row], prefix, 0.25)
        assert (out[start : start + new].double() - expected).norm() <= tolerance * expected.norm()
        start += new


def test_a_chunk_costs_its_own_queries_only():
    assert causal_mask(5000, 512).shape == (512, 5512)
