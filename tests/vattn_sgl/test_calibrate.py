"""How the server that calibrates ahead is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vattn_sgl import calibrate, support


@pytest.mark.parametrize("on_gpu", [False, True])
def test_it_is_served_in_a_dtype_that_the_kernels_here_read(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    flag, name = calibrate.default_arguments()
    reasons = support.gpu_pool_reasons if on_gpu else support.cpu_pool_reasons
    assert flag == "--dtype"
    assert list(reasons(SimpleNamespace(dtype=getattr(torch, name)))) == []
