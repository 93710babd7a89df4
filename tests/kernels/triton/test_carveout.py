"""Which kernels are asked to share one carveout; that CUDA hears it, `tests/gpu` checks."""

from __future__ import annotations

import ctypes

import pytest
import torch
from triton import knobs

from vattn_kernels.triton import carveout, layout


@pytest.fixture
def asked(monkeypatch):
    """Functions that the driver was asked about, on a GPU of so many bytes of shared memory a multiprocessor."""
    calls = []

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuFuncSetAttribute(self, function, attribute, value):  # noqa: N802 (CUDA's name)
            calls.append((function.value, attribute, value))

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def load(name, shared_memory=228 << 10):
        monkeypatch.setattr(layout, "_shared_memory", lambda device: shared_memory)
        calls.clear()
        knobs.runtime.kernel_load_end_hook(None, 7, name, None, "")
        return list(calls)

    return load


def test_kernels_of_a_step_are_asked(asked):
    for name in ("prepare_fwd_kernel", "select_lists_fwd_kernel", "finish_fwd_kernel"):
        assert asked(name) == [(7, carveout.ATTRIBUTE, carveout.PERCENT)]


def test_others_kernels_are_left_alone(asked):
    assert asked("_fwd_kernel_stage1") == asked("update_fwd_kernel") == []


def test_a_small_multiprocessor_keeps_what_must_run_at_once(asked):
    # 100 KiB of an RTX 4090, 164 of an A100.
    assert asked("finish_fwd_kernel", 100 << 10) == asked("finish_fwd_kernel", 164 << 10) == []
    assert not layout.carveout_holds(torch.device("cpu"), carveout.PERCENT)
