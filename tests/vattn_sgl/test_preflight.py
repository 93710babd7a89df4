"""Everything that would stop a server is told at once, a line each."""

from __future__ import annotations

import pytest
import torch

from vattn_sgl import preflight
from vattn_sgl.config import Settings
from vattn_sgl.selectors.hash_weights import NAMES
from vattn_sgl.support import Unsupported


@pytest.mark.parametrize(
    ("on_gpu", "told"), [(False, "dense_backend triton: a CPU"), (True, "group_score mean: the GPU kernels")]
)
def test_settings_are_looked_at_for_the_device_here(on_gpu, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv("VATTN_GROUP_SCORE", "mean")
    monkeypatch.setenv("VATTN_DENSE_BACKEND", "triton")
    monkeypatch.setenv("VATTN_PREFILL_BACKEND", "vattention")
    with pytest.raises(Unsupported) as caught:
        preflight.check_settings()
    backend, device = caught.value.reasons
    assert "prefill_backend 'vattention' is not a backend of SGLang" in backend
    assert told in device


def test_what_does_not_suit_the_model_is_told_in_lines(small_folder):
    unsuited = Settings(selector="hash", hash_weights="/none.pt", layers={"30": {}, "29-31": {}})
    with pytest.raises(Unsupported) as caught:
        preflight.check_model(small_folder, unsuited)
    assert caught.value.reasons == [
        "the settings: layers.30: got 30; expected a layer of this model, 0 to 29",
        "the settings: layers.29-31: got 31; expected a layer of this model, 0 to 29",
        "hash_weights /none.pt: hash_weights: got 'no such file'; "
        "expected a file of HashAttention weights, or another selector",
    ]
    preflight.check_model(small_folder, Settings(layers={"0-29": {}}))


def test_weights_of_another_model_are_told(small_folder, tmp_path):
    nets = {name: [torch.zeros(9, 64, 32) if "matrix" in name else torch.zeros(9, 32)] for name in NAMES}
    torch.save({0: nets}, tmp_path / "weights.pt")
    with pytest.raises(Unsupported, match="29 layers from 1 on: got 'missing"):
        preflight.check_model(small_folder, Settings(selector="hash", hash_weights=str(tmp_path / "weights.pt")))
