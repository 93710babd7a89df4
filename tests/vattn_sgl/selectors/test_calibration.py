"""When a server observes, solves and keeps its calibration."""

from __future__ import annotations

import pytest
import torch

from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry
from vattn_sgl.selectors.calibration import COVERAGE_SLACK, GROWTH, Calibration, CalibrationStore, model_key

GEOMETRY = CacheGeometry(2, 700, 2, 16, torch.device("cpu"))
SETTINGS = Settings(calibration_tokens=512)
KEYS = torch.randn(2, 700, 2, 16, generator=torch.Generator().manual_seed(0))


def fresh():
    return Calibration(SETTINGS, GEOMETRY, CalibrationStore("model", GEOMETRY, 64))


def pass_(calibration, longest, num_tokens):
    """One forward pass over `num_tokens` new tokens; whether it was observed."""
    wanted = calibration.wants(longest, num_tokens)
    for layer in range(2 if wanted else 0):
        calibration.observe(layer, torch.randn(num_tokens, 4, 16), KEYS[layer, :num_tokens])
    return wanted


def solve(calibration):
    calibration.solve(lambda layer, slots: KEYS[layer, slots], torch.arange(600))


def test_observes_until_enough_then_only_longer_contexts():
    c = fresh()
    assert c.covered == 0
    assert pass_(c, 300, 300)
    assert not c.due()
    assert pass_(c, 600, 300)
    assert c.due()
    solve(c)
    assert (c.covered, c.observed_tokens) == (int(600 * COVERAGE_SLACK), 600)
    assert not pass_(c, int(600 * GROWTH), 100)
    assert not c.due()
    assert pass_(c, 1000, 63)
    assert not c.due()
    assert pass_(c, 1001, 1)
    assert c.due()
    solve(c)
    assert c.covered == int(1001 * COVERAGE_SLACK)


def test_an_empty_pass_is_not_observed():
    assert not fresh().wants(0, 0)


def test_the_next_start_loads_what_was_kept():
    first = fresh()
    pass_(first, 600, 600)
    solve(first)
    second = fresh()
    assert (second.covered, second.observed_tokens) == (first.covered, 600)
    for name in ("mean", "key_basis", "query_basis", "steps", "fields"):
        assert torch.equal(getattr(second.tables, name), getattr(first.tables, name))
    assert torch.equal(second.moments.qq, first.moments.qq)
    assert not pass_(second, 600, 600)


@pytest.mark.parametrize("damage", [b"", b"no safetensors file", None])
def test_a_broken_file_is_calibrated_again(damage, caplog):
    c = fresh()
    pass_(c, 600, 600)
    solve(c)
    c.store.path.write_bytes(c.store.path.read_bytes()[:1000] if damage is None else damage)
    again = fresh()
    assert again.covered == 0
    assert "cannot be read" in caplog.text
    assert pass_(again, 600, 600)
    solve(again)
    assert fresh().covered > 0


def test_a_cache_that_cannot_be_written_is_logged_and_served_from_memory(tmp_path, monkeypatch, caplog):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("VATTN_CACHE", str(blocker))
    c = fresh()
    pass_(c, 600, 600)
    solve(c)
    assert c.covered > 0
    assert "could not be kept" in caplog.text


def test_another_bit_count_or_geometry_is_another_file():
    other = CacheGeometry(3, 700, 2, 16, torch.device("cpu"))
    stores = [
        CalibrationStore("m", GEOMETRY, 64),
        CalibrationStore("m", GEOMETRY, 128),
        CalibrationStore("m", other, 64),
    ]
    assert len({store.path for store in stores}) == 3


def test_model_key_follows_the_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = model_key(str(tmp_path))
    assert model_key(str(tmp_path) + "/") == first
    (tmp_path / "notes.txt").write_text("irrelevant")
    assert model_key(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert model_key(str(tmp_path)) != first
    assert model_key("org/name") != model_key("org/other")
