"""When a server observes, solves and keeps its calibration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vattn_kernels import dimensions, ops, reference
from vattn_kernels.rope import Rope
from vattn_sgl.config import Settings
from vattn_sgl.selectors import calibration as calibration_module
from vattn_sgl.selectors.base import CacheGeometry
from vattn_sgl.selectors.calibration import (
    COVERAGE_SLACK,
    ENOUGH_TOKENS,
    GROWTH,
    LEAST_SPAN,
    Calibration,
    CalibrationStore,
    model_key,
    spread_positions,
)

GEOMETRY = CacheGeometry(2, 700, 2, 16, torch.device("cpu"))
SETTINGS = Settings(calibration_tokens=512)
META = ("longest", "covered", "tokens")
KEYS = torch.randn(2, 700, 2, 16, generator=torch.Generator().manual_seed(0))
# Values of the first layer vary in two dimensions, those of the second in sixteen.
VALUES = torch.stack([KEYS[0, ..., :2] @ KEYS[0, :2, 0], KEYS[1]])
QUERIES = torch.randn(700, 4, 16, generator=torch.Generator().manual_seed(1))


def rope(num_positions=40000, base=1e4, dtype=torch.float64):
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * base ** (-torch.arange(8) / 8.0)
    return Rope.from_cache(torch.cat([angles.cos(), angles.sin()], -1).to(dtype), 16, True)


def fresh(rotation=None):
    return Calibration(SETTINGS, GEOMETRY, CalibrationStore("model", GEOMETRY, 64), rope=rotation)


def pass_(calibration, longest, num_tokens):
    """One forward pass over `num_tokens` new tokens; whether it was observed."""
    wanted = calibration.wants(longest, num_tokens)
    for layer in range(2 if wanted else 0):
        calibration.observe(layer, QUERIES[:num_tokens], KEYS[layer, :num_tokens], torch.arange(num_tokens))
    return wanted


def solve(calibration, longest=600):
    calibration.solve(
        lambda layer, slots: (KEYS[layer, slots], VALUES[layer, slots]), torch.arange(600), torch.arange(700), longest
    )


def test_observes_until_enough_then_only_longer_contexts():
    c = fresh()
    assert c.covered == 0
    assert pass_(c, 300, 300)
    assert not c.due(0)
    assert pass_(c, 600, 300)
    assert c.due(0)
    solve(c)
    assert (c.covered, c.observed_tokens) == (int(600 * COVERAGE_SLACK), 600)
    assert not pass_(c, int(600 * GROWTH), 100)
    assert not c.due(0)
    assert pass_(c, 1000, 63)
    assert not c.due(0)
    assert pass_(c, 1001, 1)
    assert c.due(0)
    solve(c)
    assert c.covered == int(1001 * COVERAGE_SLACK)


def test_a_known_rotation_covers_positions_that_were_never_observed():
    c = fresh(rope())
    assert pass_(c, 600, 600)
    solve(c)
    assert c.covered == LEAST_SPAN
    assert not c.due(LEAST_SPAN)
    assert c.due(LEAST_SPAN + 1)
    solve(c, LEAST_SPAN + 1)
    assert c.covered == 2 * LEAST_SPAN
    assert not c.due(2 * LEAST_SPAN)


def test_dimensions_of_values_are_learnt_and_kept():
    c = fresh()
    assert c.dimensions == (dimensions.MOST,) * 2
    pass_(c, 600, 600)
    solve(c)
    assert 1 <= c.dimensions[0] <= 2
    assert c.dimensions[1] == dimensions.MOST
    assert fresh().dimensions == c.dimensions


def test_a_span_ends_where_the_rotation_does():
    c = fresh(rope(9000))
    pass_(c, 600, 600)
    solve(c, 8500)
    assert c.covered == 9000
    assert not c.due(20000)


def test_with_a_known_rotation_tokens_are_observed_until_there_are_enough():
    c = fresh(rope())
    pass_(c, 600, 600)
    solve(c)
    assert not pass_(c, 601, 1), "a decode step is not worth a look"
    assert pass_(c, 600, 599)
    assert not c.due(600)
    assert pass_(c, 600, 64)
    assert c.due(600)
    solve(c)
    assert c.observed_tokens == 1263
    c.observed_tokens = ENOUGH_TOKENS
    assert not pass_(c, 600, 600)


def test_moved_moments_make_a_basis_for_far_positions():
    """A basis of the first 600 positions loses a slowly turning direction at 8,000; a moved one does not."""
    rotation, head = rope(), torch.zeros(16)
    head[7] = 3.0  # turns by a radian in 3,000 positions
    content = head + 0.1 * torch.randn(700, 2, 16, generator=torch.Generator().manual_seed(2))
    near, far = torch.arange(700), torch.arange(7300, 8000)
    errors = []
    for known in (None, rotation):
        c = fresh(known)
        c.store.path.unlink(missing_ok=True)
        c.wants(600, 600)
        for layer in range(2):
            c.observe(layer, QUERIES[:600], rotation.rotate(content[:600], near[:600]), near[:600])
        c.solve(lambda _, slots: (rotation.rotate(content, near)[slots],) * 2, near[:600], near, 600)
        k = rotation.rotate(content, far)
        codes, norms = torch.zeros(700, 2, 2, dtype=torch.int32), torch.zeros(700, 2, 2, dtype=torch.uint8)
        t = c.tables
        tables = (t.mean[0], t.key_basis[0], t.steps[0], t.fields[0])
        ops.encode(k, k, near, *tables, codes, norms, torch.zeros(700, dtype=torch.uint8))
        errors.append(reference.sketch.norm_of(norms[..., 0]).mean())
    assert errors[1] < 0.7 * errors[0]


def test_another_rotation_calibrates_again():
    first = fresh(rope())
    pass_(first, 600, 600)
    solve(first)
    assert fresh(rope()).covered == LEAST_SPAN
    assert fresh(rope(dtype=torch.bfloat16)).covered == LEAST_SPAN, "a server of another dtype casts the rotation"
    assert fresh(rope(base=1.01e4)).covered == 0
    assert fresh(rope(base=5e4)).covered == 0
    assert fresh().covered == 0


@given(count=st.integers(1, 2000), span=st.integers(1, 200000))
def test_positions_are_spread_evenly(count, span):
    positions = spread_positions(count, span)
    assert (positions >= 0).all()
    assert (positions < span).all()
    gaps = torch.cat([torch.tensor([0]), positions, torch.tensor([span])]).sort().values.diff()
    assert gaps.max() <= 3 * span / count + 1


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


def rewrite(path, tensors=(), meta=(), sign=True):
    """Change a calibration's file, by default with a checksum that fits."""
    with safe_open(path, framework="pt") as file:
        stored, kept = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept |= dict(tensors)
    stored |= {name: str(value) for name, value in dict(meta).items()}
    if sign:
        stored["sha256"] = calibration_module._checksum(kept, {name: int(stored[name]) for name in META})
    else:
        stored.pop("sha256")
    save_file(kept, path, metadata=stored)


def changed(fields, index, value):
    fields = fields.clone()
    fields[1, 1, index[0], index[1]] = value
    return fields


DAMAGE = {
    "fields out of range": lambda t: ({"tables.fields": torch.full_like(t.fields, 2**30)}, {}),
    "a word that is not there": lambda t: ({"tables.fields": changed(t.fields, (0, 0), 2)}, {}),
    "a shift out of the byte": lambda t: ({"tables.fields": changed(t.fields, (3, 1), 29)}, {}),
    "a negative shift": lambda t: ({"tables.fields": changed(t.fields, (0, 1), -8)}, {}),
    "a width of 6": lambda t: ({"tables.fields": changed(t.fields, (0, 2), 6)}, {}),
    "a wrong shape": lambda t: ({"tables.mean": t.mean[:, :1].clone()}, {}),
    "a wrong dtype": lambda t: ({"tables.steps": t.steps.double()}, {}),
    "no numbers": lambda t: ({"tables.key_basis": t.key_basis * float("nan")}, {}),
    "infinite moments": lambda t: ({"moments.k_count": torch.full((2,), float("inf"))}, {}),
    "nothing observed": lambda t: ({}, {"longest": 0}),
    "negative contexts": lambda t: ({}, {"longest": -5}),
    "endless contexts": lambda t: ({}, {"covered": 2**40}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_the_kernels_would_trip_over_is_calibrated_again(damage, caplog):
    c = fresh()
    pass_(c, 600, 600)
    solve(c)
    rewrite(c.store.path)
    assert fresh().covered == c.covered
    rewrite(c.store.path, *DAMAGE[damage](c.tables))
    again = fresh()
    assert again.covered == 0
    assert str(c.store.path) in caplog.text
    assert "calibrating again" in caplog.text
    assert pass_(again, 600, 600)


def test_a_flipped_bit_or_a_file_without_a_checksum_is_calibrated_again(caplog):
    c = fresh()
    pass_(c, 600, 600)
    solve(c)
    whole = c.store.path.read_bytes()
    c.store.path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert fresh().covered == 0
    c.store.path.write_bytes(whole)
    assert fresh().covered == c.covered
    rewrite(c.store.path, sign=False)
    assert fresh().covered == 0
    assert caplog.text.count("checksum is missing or does not fit") == 2


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
