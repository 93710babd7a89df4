"""How the server that calibrates ahead is started, and what becomes of its calibration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vattn_kernels.cache import cache_dir
from vattn_sgl import calibrate, support
from vattn_sgl.config import ConfigError
from vattn_sgl.server import ServerError

NAME = "calibration/model.safetensors"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_it_is_served_in_a_dtype_that_the_kernels_here_read(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    flag, name = calibrate.default_arguments()
    reasons = support.gpu_pool_reasons if on_gpu else support.cpu_pool_reasons
    assert flag == "--dtype"
    assert list(reasons(SimpleNamespace(dtype=getattr(torch, name)))) == []


class Fake:
    """Stands for a server that calibrates itself."""

    keeps = True

    def __init__(self, path, backend, arguments, env, admin_key):
        self.cache = Path(env["VATTN_CACHE"])

    def start(self, waiting):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def tail(self):
        return "the log"

    def generate(self, ids, count):
        self.covered = len(ids)
        if self.keeps and not (self.cache / NAME).exists():
            (self.cache / NAME).parent.mkdir()
            (self.cache / NAME).write_text("new")

    def admin(self, method, route):
        return {"ranks": [{"calibrated_positions": self.covered}]}


class Dying(Fake):
    def start(self, waiting):
        raise ServerError("it died")


class Blind(Fake):
    def admin(self, method, route):
        return {"ranks": [{"calibrated_positions": 0}]}


class Forgetful(Fake):
    keeps = False


@pytest.fixture
def folder(small_folder):
    """A model whose tokens are words."""
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(small_folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(small_folder / "tokenizer.json"))
    return small_folder


@pytest.fixture
def stored():
    """An older calibration of the model."""
    file = cache_dir() / NAME
    file.parent.mkdir(parents=True)
    file.write_text("old")
    return file


def test_a_stored_calibration_is_replaced(folder, stored, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", Fake)
    assert calibrate.run(folder) > 512
    assert stored.read_text() == "new"
    assert list(cache_dir().iterdir()) == [stored.parent]


def test_a_first_calibration_is_kept(folder, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", Fake)
    calibrate.run(folder)
    assert (cache_dir() / NAME).read_text() == "new"


@pytest.mark.parametrize(
    ("server", "told"), [(Dying, "it died"), (Blind, "contexts up to 0 are covered"), (Forgetful, "kept nothing")]
)
def test_a_stored_calibration_outlives_a_server_that_fails(server, told, folder, stored, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", server)
    with pytest.raises(ServerError, match=told):
        calibrate.run(folder)
    assert stored.read_text() == "old"
    assert list(cache_dir().iterdir()) == [stored.parent]


def test_a_cache_that_cannot_be_written_is_told_before_a_server_starts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", lambda *a, **k: pytest.fail("started"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("VATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(calibrate.CalibrationError, match="VATTN_CACHE may name another folder"):
        calibrate.run(folder)


@pytest.mark.parametrize(("positions", "most"), [(2000, 1992), (5, 0)])
def test_more_tokens_than_there_are_positions_for(positions, most, folder, change_config, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", lambda *a, **k: pytest.fail("started"))
    change_config(max_position_embeddings=positions)
    expected = rf"calibration_tokens \(VATTN_CALIBRATION_TOKENS\): got 2048; expected at most {most}, "
    with pytest.raises(ConfigError, match=expected):
        calibrate.run(folder)


def test_as_many_tokens_as_there_are_suffice_and_one_more_does_not(folder, change_config, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", Fake)
    change_config(max_position_embeddings=2**20)
    held = calibrate.run(folder)
    monkeypatch.setenv("VATTN_CALIBRATION_TOKENS", str(held))
    assert calibrate.run(folder) == held
    monkeypatch.setenv("VATTN_CALIBRATION_TOKENS", str(held + 1))
    with pytest.raises(ConfigError, match=f"got {held + 1}; expected at most {held}, "):
        calibrate.run(folder)


def test_a_selector_without_a_calibration_is_told(folder, monkeypatch):
    monkeypatch.setattr(calibrate, "Server", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setenv("VATTN_SELECTOR", "oracle")
    with pytest.raises(ConfigError, match="selector: got 'oracle'; expected one that is calibrated"):
        calibrate.run(folder)
