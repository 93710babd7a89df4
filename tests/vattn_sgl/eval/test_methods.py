"""Ways to attend: each ends in dense attention, and reads what it says."""

from __future__ import annotations

import pytest
import torch

from vattn_kernels import ops
from vattn_kernels.reference import signature
from vattn_sgl.eval import forced, methods
from vattn_sgl.eval.methods import Attention, baseline, capped, certified

POSITIONS = [300, 350, 399]
CHOSEN = torch.arange(len(POSITIONS))
SMALL = {"sink": 4, "window": 16, "pilot_min": 8}


@pytest.fixture(scope="module")
def setting(small):
    captured = small.captured(POSITIONS)
    return captured, {f"{a.name}-{a.bits}": a for a in small.adapters(captured)}, Attention(captured, small.geometry)


def error(small, setting, method, adapter, layer=1):
    captured, adapters, attention = setting
    rows = methods.causal_rows(captured, layer, CHOSEN)
    out, stats = attention.attend(method, adapters[adapter], rows)
    exact = methods.exact(captured, small.geometry, rows)
    return float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).max()), stats


@pytest.mark.parametrize("adapter", ["oracle-0", "sketch-64", "sketch-128", "quest-128", "sign-64", "hash-192"])
@pytest.mark.parametrize("sampler", ["proportional", "uniform"])
def test_epsilon_to_zero_is_dense(small, setting, sampler, adapter):
    assert error(small, setting, certified(sampler, "output", 1e-6, **SMALL), adapter)[0] < 1e-4
    assert error(small, setting, certified(sampler, "output", 0.5, **SMALL), adapter)[0] > 1e-3


@pytest.mark.parametrize("kind", methods.BASELINES)
@pytest.mark.parametrize("density", [0.15, 0.3, 1.0])
def test_baselines_read_what_they_say(small, setting, kind, density):
    found, stats = error(small, setting, baseline(kind, density, sink=4, window=16), "oracle-0")
    assert stats[..., 0].mean() == pytest.approx(density, abs=0.01)
    assert (found < 1e-4) == (density == 1.0)


@pytest.mark.parametrize("sampler", ["proportional", "uniform"])
@pytest.mark.parametrize("adapter", ["oracle-0", "quest-128"])
def test_a_capped_method_reads_its_share(small, setting, sampler, adapter):
    _, stats = error(small, setting, capped(sampler, "output", 0.3, cap=0.25, top_k=0.0, **SMALL), adapter)
    read = stats[..., ops.STATS.index("read")]
    assert float(read.mean()) == pytest.approx(20 + 0.25 * (sum(POSITIONS) / len(POSITIONS) - 19), rel=0.1)


def test_top_k_by_exact_scores_beats_a_random_choice(small, setting):
    top, _ = error(small, setting, baseline("top_k", 0.3, sink=4, window=16), "oracle-0")
    drawn, _ = error(small, setting, baseline("random", 0.3, sink=4, window=16), "oracle-0")
    assert top < drawn


@pytest.mark.parametrize("adapter", ["sign-64", "hash-192"])
def test_each_query_head_has_its_own_signatures(small, setting, adapter):
    """Queries of two positions, the group's heads one after another, against the reference of one position."""
    captured, adapters, _ = setting
    g, layer, slots = small.geometry, 1, torch.arange(300)
    codes, norms, _, mean, nets, line, widths = adapters[adapter].arguments(layer)
    for h in range(g.num_kv_heads):
        heads = slice(h * g.group, (h + 1) * g.group)
        q = captured.q[layer, :2, heads]
        found = adapters[adapter].logits(layer, h, q.flatten(0, 1), slots).unflatten(0, (2, -1))
        side = (codes[slots, h], norms[slots, h], mean[h], nets[heads], line[h], widths)
        for position in range(2):
            expected = signature.logits(q[position].double(), *side, adapter == "sign-64", g.sm_scale)
            assert torch.allclose(found[position], expected)


@pytest.mark.parametrize("adapter", ["oracle-0", "sketch-64"])
def test_dense_through_the_whole_model_has_no_divergence(small, setting, adapter):
    _, adapters, attention = setting
    found = forced.run(small.model, attention, baseline("window", 1.0), adapters[adapter], CHOSEN)
    assert float(found.kl.abs().max()) < 1e-5
    assert bool(found.agrees.all())
    assert float(found.density.min()) == 1.0
    assert float((found.loss - found.dense_loss)[:-1].abs().max()) < 1e-3
    assert bool(found.loss[-1].isnan())
    assert not bool(found.loss[:-1].isnan().any())


def test_a_rough_method_diverges_through_the_whole_model(small, setting):
    _, adapters, attention = setting
    found = forced.run(small.model, attention, baseline("window", 0.1, sink=4, window=16), adapters["oracle-0"], CHOSEN)
    assert float(found.kl.mean()) > 1e-4


def test_own_slots_do_not_touch_the_text(small, setting):
    captured, adapters, attention = setting
    before = captured.k[:, : len(small.tokens)].clone()
    rows, own = forced.decode_rows(captured, CHOSEN)
    forced.run(small.model, attention, certified("proportional", "output", 0.1, **SMALL), adapters["sketch-64"], CHOSEN)
    assert torch.equal(captured.k[:, : len(small.tokens)], before)
    assert own.tolist() == [400, 401, 402]
    assert rows.kv_indices[0, 300] == 400 and rows.kv_indices[2, 399] == 402 and rows.kv_indices[2, 300] == 300
