"""Settings under which this backend's outputs are dense attention's."""

from __future__ import annotations

import pytest
import torch

from vattn_sgl import control, plugin
from vattn_telemetry.collector import Collector

kit = pytest.importorskip(
    "sglang.test.kits.attention_unittest.attention_methods.dense_attention", reason="this SGLang has no attention kit"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every test runs on both."""
    return request.param


@pytest.fixture
def dtype(device):
    """What the device's kernels read."""
    return torch.float32 if device == "cpu" else torch.bfloat16


# What SGLang's dense backends on a GPU ask of groups that no test makes; the kit states `attn_tp_size` alone.
ONE_RANK = {"attn_cp_size": 1, "attn_cp_rank": 0, "attn_dcp_size": 1, "attn_dcp_rank": 0, "dcp_size": 1, "dcp_rank": 0}


@pytest.fixture(autouse=True)
def exact_settings(device, monkeypatch):
    """Sample whatever is longer than a few tokens, at epsilon 1e-6, and forget the control of other tests."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_parallel

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
    # The kit of 0.5.23 initialises weights in place.
    with torch.no_grad(), get_parallel().override(**ONE_RANK):
        yield
