"""What the tests of the plugin share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vattn_sgl import control

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own, no settings from outside, no control left by another test."""
    import os

    for name in os.environ:
        if name.startswith("VATTN_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VATTN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(control, "_current", None)


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A model's folder that can be read: a real configuration, a tokenizer of three words, a stand-in for weights."""
    from tokenizers import Tokenizer, models

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def change_config(small_folder: Path) -> Callable[..., None]:
    """Sets values of `small_folder`'s configuration."""
    file = small_folder / "config.json"

    def change(**values: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change
