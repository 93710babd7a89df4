"""Every selector on SGLang's own pool: dense until calibrated, indexed afterwards, never stale."""

from __future__ import annotations

import pytest
import torch

from vattn_kernels import ops, params
from vattn_kernels.quantiles import PROVABLE_SELECTORS
from vattn_sgl import compat
from vattn_sgl.config import Settings
from vattn_sgl.selectors import REGISTRY, CacheGeometry

NUM_SLOTS, NUM_LAYERS, NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM = 901, 2, 2, 4, 16
INDEXED = [name for name in ops.SELECTORS if name != "oracle"]
SCALE = HEAD_DIM**-0.5
EDGES = torch.tensor([0.1])


@pytest.fixture(params=INDEXED)
def build(request, hash_file):
    """Makes a selector, of every kind in turn."""

    def make():
        weights = hash_file if request.param == "hash" else None
        settings = Settings(calibration_tokens=512, selector=request.param, hash_weights=weights)
        geometry = CacheGeometry(
            NUM_LAYERS, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, torch.device("cpu"), num_qo_heads=NUM_QO_HEADS
        )
        return REGISTRY[request.param](settings, geometry, range(NUM_LAYERS), "model")

    return make


def forward(selector, pool, slots, longest):
    selector.begin_forward(longest, slots.numel(), pool)
    for layer in range(NUM_LAYERS):
        q = torch.randn(slots.numel(), NUM_QO_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(layer))
        selector.after_write(layer, q, slots, torch.arange(longest - slots.numel(), longest), pool)


@pytest.fixture
def calibrated(build, pool):
    """A selector that has indexed slots 1 to 601 and is told of SGLang's own writes."""
    selector = build()
    compat.watch_foreign_writes(pool, selector.invalidate)
    forward(selector, pool, torch.arange(1, 601), 600)
    forward(selector, pool, torch.tensor([601]), 601)
    return selector


def decode(selector, pool, slots, q, layer=0, epsilon=0.2):
    """Output of one step over the slots, float64 ``[num_qo_heads, head_dim]``."""
    out, stats = torch.full_like(q, float("nan")), torch.zeros(1, NUM_QO_HEADS, len(ops.STATS))
    row = torch.tensor(params.pack(epsilon, 0.05, "student"))
    ops.decode(
        q, *pool.get_kv_buffer(layer), slots[None].to(torch.int32), torch.tensor([slots.numel()]),
        *selector.arguments(layer), row, selector.covered, EDGES, EDGES, EDGES, out, stats,
        torch.zeros(27, dtype=torch.float64), [0, 1, 6, 10, 15, 20, 22], sm_scale=SCALE, layer_id=layer, seed=0,
        sampler="proportional", target="output", selector=selector.name, sink=4, window=16, dense_below=0,
        top_k_count=-1, top_k_share=0.0, pilot=0.02, pilot_min=16, cap=1.0, floor=0.05, audit_rate=0.0,
    )  # fmt: skip
    assert (stats[..., 3] != ops.OUTCOMES.index("dense")).all()
    return out[0].double()


def attention(pool, slots, q, layer=0):
    """Exact output, float64 ``[num_qo_heads, head_dim]``."""
    k, v = (buffer[slots].double().repeat_interleave(2, 1) for buffer in pool.get_kv_buffer(layer))
    p = torch.softmax(SCALE * torch.einsum("hd,nhd->hn", q[0].double(), k), -1)
    return torch.einsum("hn,nhd->hd", p, v)


def plant(pool, slot, q, layer=0):
    """Write a token that takes nearly all attention of every head, without telling anybody."""
    grouped = q[0].view(NUM_KV_HEADS, -1, HEAD_DIM).mean(1)
    k, v = pool.get_kv_buffer(layer)
    k[slot] = 60 * grouped / grouped.square().sum(-1, keepdim=True) / SCALE
    v[slot] = 5.0


def question():
    """A query whose heads of one group look for the same."""
    q = torch.randn(NUM_KV_HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    return q.expand(-1, 2, -1).reshape(1, NUM_QO_HEADS, HEAD_DIM).contiguous()


def test_dense_until_calibrated_then_what_is_cached_is_indexed(build, pool):
    selector = build()
    forward(selector, pool, torch.arange(1, 601), 600)
    assert (int(selector.covered), selector.covered_positions(), int(selector.valid.sum())) == (0, 0, 0)
    forward(selector, pool, torch.tensor([601]), 601)
    assert int(selector.covered) == selector.covered_positions() == 675
    assert selector.valid[:, 1:602].all()
    assert not selector.valid[:, 602:].any()


@pytest.mark.parametrize("build", ["quest"], indirect=True)
def test_pages_are_weighed_without_the_sinks(build, pool):
    selector = build()
    forward(selector, pool, torch.arange(1, 601), 600)
    sample = selector.sample(selector.written())
    assert sample.numel() >= 512
    assert int(selector.positions[sample].min()) >= 16


def test_side_data_follow_the_slot_when_it_is_used_again(calibrated, pool):
    slots = torch.arange(5, 9)
    forward(calibrated, pool, slots, 601)
    before = calibrated.side["codes"][0].clone()
    pool.get_key_buffer(0)[slots] += 3.0
    forward(calibrated, pool, slots, 602)
    assert not torch.equal(calibrated.side["codes"][0], before)
    assert calibrated.valid[0, slots].all()


def test_decode_is_near_the_exact_answer(calibrated, pool):
    slots, q = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:500] + 1, question()
    exact = attention(pool, slots, q)
    assert ((decode(calibrated, pool, slots, q) - exact).norm(dim=-1) < 0.3 * exact.norm(dim=-1)).all()
    exactly = decode(calibrated, pool, slots, q, epsilon=1e-6)
    assert torch.allclose(exactly, exact, atol=1e-4)


def test_slots_that_sglang_writes_itself_become_invalid(calibrated, pool):
    pool.load_cpu_copy(pool.get_cpu_copy(torch.tensor([10, 11])), torch.tensor([20, 21]))
    assert (calibrated.valid == 0).nonzero()[:, 1].unique().tolist() == [0, 20, 21, *range(602, NUM_SLOTS)]
    forward(calibrated, pool, torch.tensor([20]), 602)
    assert calibrated.valid[:, 20].all()
    assert not calibrated.valid[:, 21].any()


@pytest.mark.parametrize("writer", ["move_kv_cache", "load_cpu_copy"])
def test_a_stale_signature_is_not_used(calibrated, pool, writer):
    """A slot that SGLang fills itself holds nearly all attention: it is read, whatever its old side data say."""
    slots, q = torch.arange(1, 601), question()
    stale, spare = torch.tensor([300]), torch.tensor([800])
    before = decode(calibrated, pool, slots, q)
    plant(pool, spare, q)
    if writer == "move_kv_cache":
        pool.move_kv_cache(stale, spare)
    else:
        pool.load_cpu_copy(pool.get_cpu_copy(spare), stale)
    exact = attention(pool, slots, q)
    assert (exact - before).norm(dim=-1).min() > 1, "the token that was planted matters"
    assert torch.allclose(decode(calibrated, pool, slots, q), exact, rtol=0.05, atol=0.05)
    # The old signature, were it trusted, would lose the token.
    calibrated.valid[:, stale] = 1
    assert (decode(calibrated, pool, slots, q) - exact).norm(dim=-1).max() > 1


def test_a_shared_prefix_keeps_its_side_data(calibrated, pool):
    """Radix reuse: another request's table names the same slots; nothing is written, so nothing changes."""
    prefix, q = torch.arange(1, 400), question()
    codes = calibrated.side["codes"][:, : 384 // 16 if calibrated.name == "quest" else 400].clone()
    tail = torch.arange(610, 680)
    forward(calibrated, pool, tail, 470)
    assert torch.equal(calibrated.side["codes"][:, : codes.shape[1]], codes)
    slots = torch.cat([prefix, tail])
    exact = attention(pool, slots, q)
    assert ((decode(calibrated, pool, slots, q) - exact).norm(dim=-1) < 0.3 * exact.norm(dim=-1)).all()


def test_a_loaded_calibration_marks_nothing_valid(build, calibrated, pool):
    second = build()
    assert second.covered_positions() == 675
    assert not second.valid.any()
    for layer in range(NUM_LAYERS):
        for name in calibrated.calibration.store.names:
            mine, others = (getattr(s.tables, name)[layer] for s in (calibrated, second))
            assert torch.equal(mine, others)
    forward(second, pool, torch.tensor([3]), 3)
    assert second.valid.sum() == NUM_LAYERS


# 8 bytes of code and 2 norms a head (a head's share of 16 slots' bounds and 1 norm), 1 valid byte.
POSITION_BYTES = 4
BYTES = {"sketch": 2 * 10 + 1, "sign": 2 * 9 + 1, "hash": 2 * (2 * 8 + 1) + 1, "quest": 2 * (2 * 16 * 4 // 16 + 1) + 1}


def test_bytes_per_token_are_what_is_allocated(build):
    selector = build()
    assert selector.bytes_per_token() == NUM_LAYERS * BYTES[selector.name] + POSITION_BYTES
    tensors = {id(t): t for t in vars(selector).values() if isinstance(t, torch.Tensor)}
    tensors |= {id(t): t for t in selector.side.values()}
    held = sum(t.nbytes for t in tensors.values())
    assert held == pytest.approx(selector.bytes_per_token() * NUM_SLOTS, rel=0.02)


def test_upper_bound(calibrated, pool):
    q = torch.randn(3, NUM_QO_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    slots = torch.arange(1, 602)
    bound = calibrated.upper_bound(1, q, slots)
    if calibrated.name not in PROVABLE_SELECTORS:
        assert bound is None
        return
    k = pool.get_key_buffer(1)[slots].repeat_interleave(2, 1)
    logits = SCALE * torch.einsum("thd,nhd->thn", q, k)
    assert bound.shape == logits.shape
    assert (bound >= logits - 1e-5).all()
    assert (bound.amax(-1) < 4 * logits.amax(-1)).all(), "a bound that is nowhere near says nothing"


def test_a_scaled_fp8_pool_is_calibrated_on_what_it_stands_for(pool):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    fp8 = MHATokenToKVPool(
        size=NUM_SLOTS - 1, page_size=1, dtype=torch.float8_e4m3fn, head_num=NUM_KV_HEADS, head_dim=HEAD_DIM,
        layer_num=NUM_LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    scales = ((0.5, 4.0), (2.0, 0.25))
    for layer, factors in enumerate(scales):
        for stored, plain, scale in zip(fp8.get_kv_buffer(layer), pool.get_kv_buffer(layer), factors, strict=True):
            stored.copy_(plain / scale)
            plain.copy_(stored.float() * scale)
    shape = (NUM_LAYERS, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, torch.device("cpu"))
    settings, slots = Settings(calibration_tokens=512), torch.arange(1, 601)
    found = []
    for cache, given in ((fp8, scales), (pool, ())):
        geometry = CacheGeometry(*shape, cache.dtype, NUM_QO_HEADS, scales=given)
        selector = REGISTRY["sketch"](settings, geometry, range(NUM_LAYERS), f"model-{cache.dtype}")
        forward(selector, cache, slots, 600)
        found.append((selector.calibration.moments, [selector.cached(cache, layer, slots) for layer in (0, 1)]))
    (moments, cached), (expected_moments, expected) = found
    assert torch.equal(moments.k, expected_moments.k) and torch.equal(moments.kk, expected_moments.kk)
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(cached, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
