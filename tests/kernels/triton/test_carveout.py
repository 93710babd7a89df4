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
    calls, answer = [], [0]

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuFuncSetAttribute(self, function, attribute, value):  # noqa: N802 (CUDA's name)
            calls.append((function.value, attribute, value))
            return answer[0]

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def load(name, shared_memory=228 << 10, error=0):
        monkeypatch.setattr(layout, "shared_memory", lambda device: shared_memory)
        calls.clear()
        answer[0] = error
        knobs.runtime.kernel_load_end_hook(None, 7, name, None, "")
        return list(calls)

    return load


def test_kernels_of_a_step_are_asked(asked):
    for name in ("prepare_fwd_kernel", "select_lists_fwd_kernel", "finish_fwd_kernel"):
        assert asked(name) == [(7, carveout.ATTRIBUTE, carveout.PERCENT)]


def test_others_kernels_are_left_alone(asked):
    assert asked("_fwd_kernel_stage1") == asked("update_fwd_kernel") == []


def test_a_small_multiprocessor_keeps_what_must_run_at_once(asked):
    # 164 KiB of an A100, all of which two programs take; 100 of an RTX 4090, which runs one.
    assert asked("finish_fwd_kernel", 164 << 10) == [(7, carveout.ATTRIBUTE, 100)]
    assert [layout.finish_programs(torch.device("cuda"), dim) for dim in (64, 128, 256)] == [2, 2, 1]
    assert asked("finish_fwd_kernel", 100 << 10) == []
    assert layout.finish_programs(torch.device("cuda"), 64) == 1


def test_the_share_asked_for_holds_what_runs_at_once(asked):
    for shared in (164 << 10, 228 << 10):
        ((_, _, percent),) = asked("finish_fwd_kernel", shared)
        for dim in (64, 128, 256):
            assert (
                layout.finish_programs(torch.device("cuda"), dim) == 1
                or layout.finish_shared(dim) <= shared * percent // 100
            )


def test_a_refusal_is_an_error(asked):
    with pytest.raises(RuntimeError, match="CUDA answered 1, expected 0, when finish_fwd_kernel asked for 75 %"):
        asked("finish_fwd_kernel", error=1)
