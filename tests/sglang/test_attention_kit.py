"""SGLang's own attention tests, run on this backend at epsilon to 0 (``sglang.test.kits.attention_unittest``)."""

from __future__ import annotations

import dataclasses
import unittest

import pytest

from vattn_sgl import plugin

kit = pytest.importorskip(
    "sglang.test.kits.attention_unittest.attention_methods.dense_attention", reason="this SGLang has no attention kit"
)

BACKEND = plugin.BACKEND
CASES = {c.name: dataclasses.replace(c, page_size=1) for c in kit.make_dense_cases(BACKEND)}
DECODES = {
    "gqa_decode_sampled": {"num_heads": 4, "num_kv_heads": 2, "prefix_lens": (40, 17, 59)},
    "mqa_decode_sampled": {"num_heads": 3, "num_kv_heads": 1, "prefix_lens": (62,)},
    "mha_decode_sampled": {"num_heads": 2, "num_kv_heads": 2, "prefix_lens": (1, 63, 30)},
}


def decode_case(name):
    decode = kit.ForwardMode.DECODE
    return kit.DenseAttentionCase(name=name, backend=BACKEND, forward_mode=decode, page_size=1, **DECODES[name])


@pytest.mark.parametrize("name", sorted(CASES))
def test_dense_case(name, device, dtype):
    kit.run_dense_attention_case(unittest.TestCase(), CASES[name], head_dim=64, dtype=dtype, device=device)


@pytest.mark.parametrize("layout", ["contiguous", "shuffled_pages", "interleaved_pages", "non_monotonic_extend"])
@pytest.mark.parametrize("name", sorted(DECODES))
def test_sampled_decode(name, layout, device, dtype):
    kit.run_dense_attention_case(
        unittest.TestCase(), decode_case(name), head_dim=64, dtype=dtype, device=device, loc_layout=layout
    )


@pytest.mark.parametrize("name", sorted(DECODES))
def test_graph_metadata(name, device, dtype):
    graph = pytest.importorskip("sglang.test.kits.attention_unittest.runner_modes.cuda_graph_decode_runner")
    graph.run_dense_cuda_graph_decode_case(
        unittest.TestCase(), decode_case(name), head_dim=64, dtype=dtype, device=device, cuda_graph_capture_batch_size=4
    )
