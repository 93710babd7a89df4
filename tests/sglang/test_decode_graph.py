"""What a captured decode graph relies on: a step reads only tensors that are refreshed in place."""

from __future__ import annotations

import dataclasses
import unittest
from types import SimpleNamespace

import pytest
import torch

from vattn_sgl import control, plugin

kit = pytest.importorskip(
    "sglang.test.kits.attention_unittest.attention_methods.dense_attention", reason="this SGLang has no attention kit"
)

PREFIXES = (40, 17, 59)
HEADS, BUCKET = 4, 4


@pytest.fixture
def fixture(device, dtype):
    case = kit.DenseAttentionCase(
        name="graph",
        backend=plugin.BACKEND,
        forward_mode=kit.ForwardMode.DECODE,
        page_size=1,
        num_heads=HEADS,
        num_kv_heads=2,
        prefix_lens=PREFIXES,
    )
    return kit.build_dense_attention_fixture(
        unittest.TestCase(), case, head_dim=64, dtype=dtype, device=device, runner_batch_size=BUCKET
    )


def padded(batch):
    """The batch as SGLang fills it up to a captured size: request row 0, slot 0, no tokens."""

    def pad(x):
        return torch.cat([x, x.new_zeros(BUCKET - x.shape[0])])

    names = ("input_ids", "req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions")
    return dataclasses.replace(batch, batch_size=BUCKET, **{name: pad(getattr(batch, name)) for name in names})


def view(batch):
    """What `init_forward_metadata_out_graph` is given at a replay."""
    names = ("batch_size", "forward_mode", "req_pool_indices", "seq_lens", "seq_lens_cpu")
    return SimpleNamespace(**{name: getattr(batch, name) for name in names})


def forward(fixture, hidden, batch):
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    with torch.no_grad(), forward_context(ForwardContext(attn_backend=fixture.backend)):
        return fixture.actual_module(hidden, batch)


def capture(fixture, hidden, batch):
    """Something to replay: a CUDA graph, or on a CPU the step with the very tensors that it reads now."""
    rows = fixture.backend.rows

    def step():
        fixture.backend.rows = rows
        return forward(fixture, hidden, batch)

    out = step()
    if hidden.device.type == "cpu":
        return out, step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()

    def replay():
        graph.replay()
        return recorded.clone()

    return out, replay


def counted(backend):
    layout, row = backend.telemetry.layout, backend.telemetry.counters[0].tolist()
    return row[layout.block("context")][0], sum(row[layout.block("outcome")])


def test_a_padded_replay_equals_the_eager_step(fixture):
    backend = fixture.backend
    eager = kit.run_dense_fixture_eager(fixture)
    before = counted(backend)
    assert before[1] == len(PREFIXES) * HEADS
    backend.init_cuda_graph_state(BUCKET, BUCKET)
    batch = padded(fixture.forward_batch)
    lengths = batch.seq_lens.clone()
    batch.seq_lens.fill_(backend.get_cuda_graph_seq_len_fill_value())
    x = fixture.input_hidden
    hidden = torch.cat([x, x.new_zeros(BUCKET - x.shape[0], x.shape[1])])

    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    dummy, replay = capture(fixture, hidden, batch)
    assert counted(backend) == before
    assert dummy.isfinite().all()

    batch.seq_lens.copy_(lengths)
    control.get().stage({"epsilon": 1e-5})
    backend.init_forward_metadata_out_graph(view(batch))
    assert control.get().in_force()["all"]["epsilon"] == 1e-5
    torch.testing.assert_close(replay()[:3], eager, atol=1e-2, rtol=1e-2)
    assert counted(backend) == (2 * before[0], 2 * before[1])


def test_the_page_table_outlives_a_write_of_the_scheduler(fixture):
    backend, batch = fixture.backend, padded(fixture.forward_batch)
    backend.init_cuda_graph_state(BUCKET, BUCKET)
    backend.init_forward_metadata_out_graph(view(batch))
    table = backend.rows.kv_indices.clone()
    assert torch.equal(table[:3], backend.req_to_token[:3, : backend.max_len])
    backend.req_to_token.zero_()
    assert torch.equal(backend.rows.kv_indices, table)


def test_batches_larger_than_the_workspace_are_cut(fixture, monkeypatch):
    whole = kit.run_dense_fixture_eager(fixture)
    monkeypatch.setattr(fixture.backend, "max_batch", 2)
    torch.testing.assert_close(kit.run_dense_fixture_eager(fixture), whole, atol=1e-2, rtol=1e-2)


def test_dummy_batches_teach_nothing(fixture, monkeypatch):
    backend = fixture.backend
    told = []
    monkeypatch.setattr(backend.selector, "begin_forward", lambda longest, tokens, pool: told.append((longest, tokens)))
    monkeypatch.setattr(backend.telemetry, "begin_forward", lambda: told.append("telemetry"))
    with backend._capture():
        backend.init_forward_metadata(fixture.forward_batch)
    assert told == [(0, 0)]
    backend.init_forward_metadata(fixture.forward_batch)
    assert told[1:] == [(max(PREFIXES) + 1, 0), "telemetry"]


def test_a_capture_that_fails_does_not_leave_the_backend_capturing(fixture):
    backend = fixture.backend
    with pytest.raises(RuntimeError, match="out of memory"), backend._capture():
        assert backend.capturing
        raise RuntimeError("out of memory")
    assert not backend.capturing
