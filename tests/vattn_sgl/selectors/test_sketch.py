"""The sketch selector on SGLang's own pool: dense until calibrated, indexed afterwards, never stale."""

from __future__ import annotations

import pytest
import torch

from vattn_sgl import compat
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry
from vattn_sgl.selectors.sketch import SketchSelector

NUM_SLOTS, NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 901, 2, 2, 16


@pytest.fixture
def pool():
    """A real pool of SGLang with random K and V."""
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
    for layer in range(NUM_LAYERS):
        for buffer in made.get_kv_buffer(layer):
            buffer.normal_(generator=torch.Generator().manual_seed(layer))
    return made


def build():
    geometry = CacheGeometry(NUM_LAYERS, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, torch.device("cpu"))
    return SketchSelector(Settings(calibration_tokens=512), geometry, range(NUM_LAYERS), "model")


def forward(selector, pool, slots, longest):
    selector.begin_forward(longest, slots.numel(), pool)
    for layer in range(NUM_LAYERS):
        q = torch.randn(slots.numel(), 4, HEAD_DIM, generator=torch.Generator().manual_seed(layer))
        selector.after_write(layer, q, slots, pool)


def test_dense_until_calibrated_then_what_is_cached_is_indexed(pool):
    selector = build()
    forward(selector, pool, torch.arange(1, 601), 600)
    assert (int(selector.covered), selector.covered_positions(), int(selector.valid.sum())) == (0, 0, 0)
    forward(selector, pool, torch.tensor([601]), 601)
    assert int(selector.covered) == selector.covered_positions() == 675
    assert selector.valid[:, 1:602].all()
    assert not selector.valid[:, 602:].any()


def test_side_data_follow_the_slot_when_it_is_used_again(pool):
    selector = build()
    forward(selector, pool, torch.arange(1, 601), 600)
    slots = torch.arange(5, 9)
    forward(selector, pool, slots, 601)
    before = selector.codes[0, slots].clone()
    pool.get_key_buffer(0)[slots] += 3.0
    forward(selector, pool, slots, 602)
    assert not torch.equal(selector.codes[0, slots], before)
    assert selector.valid[0, slots].all()


def test_slots_that_sglang_writes_itself_become_invalid(pool):
    selector = build()
    compat.watch_foreign_writes(pool, selector.invalidate)
    forward(selector, pool, torch.arange(1, 601), 600)
    forward(selector, pool, torch.tensor([601]), 601)
    pool.load_cpu_copy(pool.get_cpu_copy(torch.tensor([10, 11])), torch.tensor([20, 21]))
    assert (selector.valid == 0).nonzero()[:, 1].unique().tolist() == [0, 20, 21, *range(602, NUM_SLOTS)]
    forward(selector, pool, torch.tensor([20]), 602)
    assert selector.valid[:, 20].all()
    assert not selector.valid[:, 21].any()


def test_a_loaded_calibration_marks_nothing_valid(pool):
    first = build()
    forward(first, pool, torch.arange(1, 601), 600)
    forward(first, pool, torch.tensor([601]), 601)
    second = build()
    assert second.covered_positions() == 675
    assert not second.valid.any()
    forward(second, pool, torch.tensor([3]), 3)
    assert second.valid.sum() == NUM_LAYERS


def test_bytes_per_token():
    # 8 bytes of code and 2 norms a head, 1 valid byte.
    assert build().bytes_per_token() == NUM_LAYERS * (NUM_KV_HEADS * (8 + 2) + 1)
