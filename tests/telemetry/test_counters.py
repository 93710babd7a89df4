from __future__ import annotations

import pytest
import torch

from vattn_telemetry.counters import BLOCKS, CounterLayout


def test_blocks_tile_the_row_in_order():
    layout = CounterLayout(3)
    blocks = [layout.block(name) for name in BLOCKS]
    assert tuple(block.start for block in blocks) == layout.offsets
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == layout.width


def test_sizes_are_those_that_the_op_relies_on():
    layout = CounterLayout(1)
    edges = (len(layout.budget_edges), len(layout.error_edges), len(layout.audit_error_edges))
    assert layout.sizes == (1, 5, 4, edges[0] + 2, edges[1] + 2, 2, edges[2] + 2)


def test_allocate_gives_float64_zeros():
    counters = CounterLayout(3).allocate("cpu")
    assert counters.shape == (3, CounterLayout(3).width)
    assert counters.dtype == torch.float64
    assert not counters.any()


def test_edge_tensors_are_float32_and_ascend():
    layout = CounterLayout(1)
    tensors = layout.edge_tensors("cpu")
    for tensor, edges in zip(tensors, (layout.budget_edges, layout.error_edges, layout.audit_error_edges), strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.tolist() == pytest.approx(edges)
        assert (tensor.diff() > 0).all()


def test_bucketize_with_the_edges_agrees_with_the_documented_buckets():
    edges = CounterLayout(1).edge_tensors("cpu")[1]
    at_edge = torch.bucketize(torch.tensor([0.05]), edges).item()
    assert CounterLayout(1).error_edges[at_edge] == 0.05
    assert torch.bucketize(torch.tensor([7.0]), edges).item() == len(edges)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="num_layers is 0"):
        CounterLayout(0)
    with pytest.raises(ValueError, match="no counter block 'erorr'; expected one of context"):
        CounterLayout(1).block("erorr")
