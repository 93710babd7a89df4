"""SGLang's own attention tests, run on this backend at epsilon to 0 (``sglang.test.kits.attention_unittest``)."""

from __future__ import annotations

import dataclasses
import unittest

import pytest
import torch

from vattn_sgl import control, plugin
from vattn_telemetry.collector import Collector

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


@pytest.fixture(autouse=True)
def exact_settings(monkeypatch):
    """Sample whatever is longer than a few tokens, at epsilon 1e-6, and forget the control of other tests."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    settings = {
        "EPSILON": "1e-6",
        "DENSE_BELOW": "0",
        "SINK": "1",
        "WINDOW": "2",
        "PILOT_MIN": "4",
        "SELECTOR": "oracle",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"VATTN_{name}", value)
    # The kit's configuration has no folder.
    monkeypatch.setattr(kit.TinyModelConfig, "model_path", "attention-kit", raising=False)
    monkeypatch.setattr(control, "_current", None)
    monkeypatch.setattr(plugin, "self_check", lambda: None)
    # A backend of the kit has no end, so its collector would read on through the tests that follow.
    monkeypatch.setattr(Collector, "start", lambda self: None)


def run(case, layout="shuffled_pages"):
    kit.run_dense_attention_case(
        unittest.TestCase(), case, head_dim=64, dtype=torch.float32, device="cpu", loc_layout=layout
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_dense_case(name):
    run(CASES[name])


@pytest.mark.parametrize("layout", ["contiguous", "shuffled_pages", "interleaved_pages", "non_monotonic_extend"])
@pytest.mark.parametrize("name", sorted(DECODES))
def test_sampled_decode(name, layout):
    decode = kit.ForwardMode.DECODE
    run(kit.DenseAttentionCase(name=name, backend=BACKEND, forward_mode=decode, page_size=1, **DECODES[name]), layout)
