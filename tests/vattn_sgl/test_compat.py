"""Differences between SGLang's versions, on the installed one."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vattn_kernels.checks import FP8_DTYPES
from vattn_sgl import compat


class Mode:
    """Stands for SGLang's forward mode."""

    def __init__(self, extend):
        self.extend = extend

    def is_extend(self):
        return self.extend


@pytest.mark.parametrize(
    ("version", "numbers"), [("0.5.20", (0, 5, 20)), ("0.5.17.post1", (0, 5, 17)), ("0.6", (0, 6))]
)
def test_version_tuple(version, numbers):
    assert compat.version_tuple(version) == numbers


def test_longest_context():
    extend = SimpleNamespace(forward_mode=Mode(True), extend_prefix_lens_cpu=[5, 0], extend_seq_lens_cpu=[3, 7])
    assert compat.longest_context(extend) == 8
    decode = SimpleNamespace(forward_mode=Mode(False), seq_lens_cpu=torch.tensor([4, 9]))
    assert compat.longest_context(decode) == 9
    without = SimpleNamespace(forward_mode=Mode(False), seq_lens_cpu=None, seq_lens=torch.tensor([4, 9]))
    assert compat.longest_context(without) == 9
    without.seq_lens = without.seq_lens.to("meta")
    assert compat.longest_context(without) == 0


def test_metric_labels_are_sglangs():
    args = SimpleNamespace(served_model_name=None, model_path="m", disaggregation_mode="null")
    labels = compat.metric_labels(SimpleNamespace(server_args=args, tp_rank=0, pp_rank=0, moe_ep_rank=0, dp_rank=None))
    assert labels == {"model_name": "m", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}


def test_foreign_writes_are_told_after_the_fact():
    calls = []

    class Pool:
        def move_kv_cache(self, tgt_loc, src_loc):
            calls.append("moved")

        def load_cpu_copy(self, kv_cache_cpu, indices):
            calls.append("loaded")

    pool = Pool()
    compat.watch_foreign_writes(pool, lambda slots: calls.append(slots))
    pool.move_kv_cache([1], [2])
    pool.move_kv_cache(tgt_loc=[3], src_loc=[4])
    pool.move_kv_cache(src_loc=[6], tgt_loc=[5])
    pool.load_cpu_copy(kv_cache_cpu=[8], indices=[7])
    assert calls == ["moved", [1], "moved", [3], "moved", [5], "loaded", [7]]


class GraphRunner:
    """Stands for SGLang's runner of decode graphs; says who replayed."""

    def __init__(self, model_runner, attn_backend=None):
        self.attn_backend = attn_backend
        self.buffers = SimpleNamespace(seq_lens=torch.zeros(4), seq_lens_cpu=torch.zeros(4))
        self.bs = 8

    def can_run_graph(self, forward_batch):
        return forward_batch != "eager"

    def execute(self, forward_batch, pp_proxy_tensors=None):
        return self.attn_backend, forward_batch, pp_proxy_tensors


def graphed_runner(first):
    """A model runner whose method of that name captures ``first``."""
    runner = SimpleNamespace(decode_cuda_graph_runner=None)

    def init_cuda_graphs():
        runner.decode_cuda_graph_runner = first

    runner.init_cuda_graphs = init_cuda_graphs
    return runner


def test_a_batch_goes_to_the_graphs_that_take_it():
    backend = SimpleNamespace(get_cuda_graph_seq_len_fill_value=lambda: 1)
    first = GraphRunner(None)
    runner = graphed_runner(first)
    compat.add_decode_graphs(runner, backend, lambda batch: batch.startswith("short"))
    runner.init_cuda_graphs()
    graphs = runner.decode_cuda_graph_runner
    assert first.buffers.seq_lens.tolist() == first.buffers.seq_lens_cpu.tolist() == [1] * 4
    assert graphs.execute("short", pp_proxy_tensors=3) == (backend, "short", 3)
    assert graphs.execute("long") == (None, "long", None)
    assert graphs.can_run_graph("short")
    assert not graphs.can_run_graph("eager")
    assert graphs.bs == 8


def test_without_decode_graphs_none_are_added():
    runner = graphed_runner(None)
    compat.add_decode_graphs(runner, None, lambda batch: True)
    runner.init_cuda_graphs()
    assert runner.decode_cuda_graph_runner is None


def test_captures_at_start_run_within_the_context():
    order = []

    class Runner:
        def init_cuda_graphs(self, capture_decode_cuda_graph=True):
            order.append(capture_decode_cuda_graph)

    @contextmanager
    def context():
        order.append("enter")
        yield
        order.append("leave")

    runner = Runner()
    compat.watch_captures(runner, context)
    runner.init_cuda_graphs(capture_decode_cuda_graph=False)
    assert order == ["enter", False, "leave"]
    compat.watch_captures(SimpleNamespace(), context)


def test_new_tokens_of_a_padded_prefill_graph():
    batch = SimpleNamespace(out_cache_loc=torch.tensor([7, 8]), positions=torch.arange(4))
    slots, positions = compat.new_tokens(batch)
    assert slots.tolist() == [7, 8] and positions.tolist() == [0, 1]


def test_largest_decode_graph_of_sglangs_configuration():
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

    def largest(**decode):
        return compat.largest_decode_graph(SimpleNamespace(cuda_graph_config=CudaGraphConfig(PhaseConfig(**decode))))

    assert largest(backend="full", bs=[1, 16, 4], max_bs=16) == 16
    assert largest(backend="disabled", bs=[1, 16]) is None
    assert largest(backend="full") is None


class RadixAttention(torch.nn.Module):
    """Stands for SGLang's, by its name."""


class MRotaryEmbedding(torch.nn.Module):
    """Stands for SGLang's, which rotates by more than a position."""


def decoder(*rotations):
    """A model with one attention layer for each rotation."""
    layers = []
    for rotation in rotations:
        layer = torch.nn.Module()
        layer.attn, layer.rotary_emb = RadixAttention(), rotation
        layers.append(layer)
    return torch.nn.ModuleList(layers)


def test_rope_is_that_of_every_layer(monkeypatch):
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    def plain(base):
        return RotaryEmbedding(16, 16, 50, base, True, torch.float32)

    first, other = plain(1e4), plain(1e5)
    found = compat.rope(decoder(first, first), 16)
    assert found.num_positions == 50
    x, positions = torch.randn(4, 2, 16), torch.arange(4)
    q, _ = first.forward_native(positions, x.flatten(1), x.flatten(1))
    assert torch.allclose(found.rotate(x, positions).flatten(1), q, atol=1e-5)
    assert compat.rope(decoder(first, other), 16) is None
    assert compat.rope(decoder(first, None), 16) is None
    assert compat.rope(decoder(MRotaryEmbedding()), 16) is None
    assert compat.rope(None, 16) is None


def fp8_layer(layer_id, k_scale=None, v_scale=None):
    """Stands for SGLang's layer, with scales as a checkpoint's are loaded."""
    layer = RadixAttention()
    layer.layer_id, layer.tp_k_head_num, layer.tp_v_head_num, layer.qk_head_dim, layer.v_head_dim = layer_id, 2, 2, 8, 8
    layer.k_scale, layer.v_scale = (None if s is None else torch.tensor(s) for s in (k_scale, v_scale))
    return layer


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("scales", [(None, None), (0.3, 1.7)])
def test_new_tokens_are_stored_in_fp8_as_sglang_does_and_left_alone(dtype, scales):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    def pool():
        return MHATokenToKVPool(
            size=9, page_size=1, dtype=dtype, head_num=2, head_dim=8, layer_num=1, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip

    ours, theirs, layer, slots = pool(), pool(), fp8_layer(0, *scales), torch.tensor([3, 5, 4])
    k, v = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    before = k.clone(), v.clone()
    compat.write_kv(ours, layer, slots, k, v)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    theirs.set_kv_buffer(
        layer,
        compat._write_location()(slots),
        *(t.view(-1, 2, 8).clone() for t in before),
        layer.k_scale,
        layer.v_scale,
    )
    for mine, other, new, scale in zip(ours.get_kv_buffer(0), theirs.get_kv_buffer(0), before, scales, strict=True):
        assert torch.equal(mine[slots].float(), other[slots].float())
        torch.testing.assert_close(mine[slots].float() * (scale or 1), new.view(-1, 2, 8).float(), rtol=0.13, atol=0.01)


def test_scales_are_those_of_this_ranks_layers():
    pool = SimpleNamespace(dtype=torch.float8_e4m3fn, start_layer=2, layer_num=3)
    model = torch.nn.ModuleList([fp8_layer(1, 9.0, 9.0), fp8_layer(4, 0.5, 2.0), fp8_layer(3), fp8_layer(2, 4.0, 0.25)])
    runner = SimpleNamespace(token_to_kv_pool=pool, model=model)
    assert compat.kv_scales(runner) == ((4.0, 0.25), (1.0, 1.0), (0.5, 2.0))
    runner.model = None
    assert compat.kv_scales(runner) == ((1.0, 1.0),) * 3
    pool.dtype = torch.bfloat16
    assert compat.kv_scales(runner) == ()
