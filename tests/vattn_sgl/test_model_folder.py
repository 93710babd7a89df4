"""What of a model's folder is refused before anything is started."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from vattn_sgl import model_folder
from vattn_sgl.model_folder import FolderError


@pytest.fixture
def without_weights(small_folder):
    (small_folder / "model.safetensors").unlink()
    return small_folder


def test_a_model_that_can_be_served(small_folder):
    described = model_folder.check(small_folder)
    assert (described.num_hidden_layers, described.head_dim, described.num_key_value_heads) == (30, 64, 3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"architectures": None}, "it names no architectures"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM: expected a class of SGLang or transformers"),
        ({"head_dim": 63}, "head_dim 63: the kernels serve multiples of 16"),
        ({"num_key_value_heads": 2}, "9 query over 2 KV heads"),
        ({"head_dim": 63, "num_key_value_heads": 2}, "; 9 query over 2 KV heads"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "an encoder-decoder model"),
        ({"model_type": "bert", "architectures": ["BertModel"], "num_key_value_heads": 9}, "not a generating model"),
    ],
)
def test_what_the_backend_cannot_serve(values, told, small_folder, change_config):
    change_config(**values)
    with pytest.raises(FolderError) as caught:
        model_folder.check(small_folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_that_comes_with_the_model_or_with_sglang_alone_is_known(small_folder, change_config):
    # SGLang serves this class, transformers has none of its name.
    change_config(architectures=["InternLM2ForCausalLM"])
    assert model_folder.reasons(model_folder.describe(small_folder)) == []
    change_config(architectures=["OwnForCausalLM"], auto_map={"AutoModel": "own.Model"})
    assert model_folder.reasons(model_folder.describe(small_folder)) == []


@pytest.mark.parametrize(("on_gpu", "refused"), [(True, True), (False, False)])
def test_the_shape_is_looked_at_for_the_device_here(on_gpu, refused, small_folder, change_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    change_config(head_dim=80)
    found = model_folder.reasons(model_folder.describe(small_folder))
    assert any("GPU kernels" in reason for reason in found) is refused
    assert bool(found) is refused


@pytest.mark.parametrize("value", [0, -8, True, None, "many"])
def test_positions_that_are_none(value, small_folder):
    file = small_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": value}))
    with pytest.raises(FolderError, match="max_position_embeddings"):
        model_folder.positions(small_folder)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "model.gguf"])
def test_files_that_sglang_does_not_read_as_weights(name, without_weights):
    torch.save({"a": torch.ones(4)}, without_weights / name)
    with pytest.raises(FolderError, match="holds no weights"):
        model_folder.check_weights(without_weights)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_weights_of_torch(name, without_weights):
    file = without_weights / name
    for zipped in (True, False):
        torch.save({"a": torch.ones(4)}, file, _use_new_zipfile_serialization=zipped)
        assert model_folder.check_weights(without_weights) == 1
    file.write_bytes(pickle.dumps({}, protocol=2))
    assert model_folder.check_weights(without_weights) == 1
    torch.save({"a": torch.ones(4)}, file)
    for wrong in (b"0123456789", file.read_bytes()[:-20]):
        file.write_bytes(wrong)
        with pytest.raises(FolderError, match=f"{name} is broken or cut short"):
            model_folder.check_weights(without_weights)


def test_only_the_kind_that_sglang_reads_is_looked_at(small_folder):
    (small_folder / "pytorch_model.bin").write_bytes(b"0123456789")
    assert model_folder.check_weights(small_folder) == 1
    (small_folder / "model.safetensors").unlink()
    (small_folder / "pytorch_model.bin").unlink()
    torch.save({}, small_folder / "training_args.bin")
    torch.save({}, small_folder / "model.pt")
    with pytest.raises(FolderError, match="holds no weights"):
        model_folder.check_weights(small_folder)
