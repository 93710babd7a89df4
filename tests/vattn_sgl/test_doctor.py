"""``vattn doctor``: what can be served and why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vattn_kernels.cpu import build
from vattn_sgl import doctor, model


def report(path):
    return [(finding.ok, finding.what, finding.mend) for finding in doctor.findings(path)]


@pytest.fixture
def built(monkeypatch):
    """Kernels that need no compiling; one test compiles them."""
    monkeypatch.setattr(build, "build", lambda: Path("kernels.so"))


@pytest.fixture
def folder(small_folder):
    return small_folder


def test_a_model_that_can_be_served(folder):
    lines = report(folder)
    assert all(ok for ok, _, _ in lines)
    assert any("9 query and 3 KV heads of 64" in what for _, what, _ in lines)
    assert any("no calibration yet" in what and "2048" in what for _, what, _ in lines)


# 30 layers of 3 KV heads of 64: 8 bytes of code, norms, a valid byte; a page's bounds are 2 x 64 elements for 16 slots.
@pytest.mark.parametrize(
    ("selector", "dtype", "expected"),
    [
        ("sketch", "bfloat16", "934 bytes a token beside 23040 of bfloat16 K and V: 4.1%"),
        ("sketch", "float32", "934 bytes a token beside 46080 of float32 K and V: 2.0%"),
        ("sign", "float32", "844 bytes a token beside 46080 of float32 K and V: 1.8%"),
        ("quest", "float32", "3004 bytes a token beside 46080 of float32 K and V: 6.5%"),
        ("oracle", "float32", "0 bytes a token beside 46080 of float32 K and V: 0.0%"),
    ],
)
def test_side_data_and_their_share_are_told(selector, dtype, expected, folder, built, monkeypatch, change_config):
    change_config(torch_dtype=dtype)
    monkeypatch.setenv("VATTN_SELECTOR", selector)
    assert (True, f"selector {selector} keeps {expected}", "") in report(folder)


@pytest.mark.parametrize(("dtype", "told"), [("float16", True), ("float32", True), ("bfloat16", False)])
def test_a_dtype_that_sglang_would_choose_and_a_cpu_cannot_read(dtype, told, folder, built, change_config):
    change_config(torch_dtype=dtype)
    advice = "start with --dtype float32 or --dtype bfloat16"
    assert any("in float16" in what and mend == advice for _, what, mend in report(folder)) is told


def test_wrong_hash_weights_are_told(folder, built, monkeypatch):
    monkeypatch.setenv("VATTN_SELECTOR", "hash")
    monkeypatch.setenv("VATTN_HASH_WEIGHTS", str(folder / "none.pt"))
    wrong = [what for ok, what, _ in report(folder) if not ok]
    assert len(wrong) == 1
    assert wrong[0].startswith(f"hash_weights {folder / 'none.pt'}: ")
    assert "no such file" in wrong[0]


def test_a_model_that_cannot(folder, built, change_config):
    change_config(hidden_size=9 * 72)
    wrong = [what for ok, what, _ in report(folder) if not ok]
    assert len(wrong) == 1
    assert "head_dim 72" in wrong[0]


def failures(path):
    return [what for ok, what, _ in report(path) if not ok]


def test_a_folder_without_weights(folder, built):
    (folder / "model.safetensors").write_bytes(b"")
    (failed,) = failures(folder)
    assert failed.startswith(f"{folder} holds no weights (.safetensors, .bin, .pt): give ")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file({"a": torch.ones(4)}, folder / "model-1.safetensors")
    (failed,) = failures(folder)
    assert failed.startswith(f"{folder} lacks model-2.safetensors: give ")
    save_file({"b": torch.ones(4)}, folder / "model-2.safetensors")
    assert failures(folder) == []
    (folder / "model.safetensors.index.json").write_text("[1]")
    (failed,) = failures(folder)
    assert failed.startswith(f"{folder / 'model.safetensors.index.json'} is no index of weights (")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert (True, "weights in 2 files", "") in report(folder)


def test_weights_that_are_no_files(folder, built):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")
    (folder / "x.safetensors").mkdir()
    (failed,) = failures(folder)
    assert failed.startswith(f"{folder} holds no weights ")


@pytest.mark.parametrize("content", ['{"weight_map": {"a": 1}}', "[" * 100000, '{"weight_map": {"a": "gone.bin"}}'])
def test_an_index_of_other_weights_that_is_wrong_is_told(content, folder, built):
    (folder / "pytorch_model.bin.index.json").write_text(content)
    assert len(failures(folder)) == 1


@pytest.mark.parametrize("kept", [4, 20, -1])
def test_weights_that_are_cut_short(kept, folder, built):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    (failed,) = failures(folder)
    assert failed.startswith(f"{file} is broken or cut short (")


def test_a_folder_without_a_tokenizer(folder, built):
    (folder / "tokenizer.json").unlink()
    (failed,) = failures(folder)
    assert failed.startswith(f"the tokenizer of {folder} ")


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_an_encoder(architecture, folder, built):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [architecture]}))
    (failed,) = failures(folder)
    assert "not a generating model" in failed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"model_type": "llama", ', "Expecting property name"),
        (b"{}", "Unrecognized model"),
        (b"[]", "a mapping was expected, not a list"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b'{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}', "a mamba has no attention heads"),
        (b'{"model_type": "llama"}', "names no architectures"),
        ({"num_attention_heads": 0}, "division"),
        ({"num_attention_heads": "nine"}, "int"),
        (b"[" * 100000, "recursion"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM: expected a class of SGLang or transformers"),
    ],
)
def test_a_config_that_cannot_be_read(content, expected, folder, change_config, built):
    if isinstance(content, dict):
        change_config(**content)
    else:
        (folder / "config.json").write_bytes(content)
    (failed,) = failures(folder)
    assert failed.startswith(f"{folder / 'config.json'}: ")
    assert expected in failed


def test_settings_that_do_not_suit_the_model_or_sglang(folder, built, monkeypatch):
    monkeypatch.setenv("VATTN_LAYERS", "{30: {epsilon: 0.1}}")
    (failed,) = failures(folder)
    assert "layers.30" in failed
    assert "0 to 29" in failed
    monkeypatch.setenv("VATTN_LAYERS", "{29: {epsilon: 0.1}}")
    monkeypatch.setenv("VATTN_PREFILL_BACKEND", "torch_native")
    assert failures(folder) == []
    monkeypatch.setenv("VATTN_PREFILL_BACKEND", "nosuch")
    (failed,) = failures(folder)
    assert "'nosuch' is not a backend of SGLang; known are" in failed


def test_no_model(tmp_path, built):
    assert (False, f"model {model.NAME} is not in the cache", "vattn model fetch") in report(None)
    (failed,) = failures(tmp_path)
    assert failed == f"{tmp_path} is not a model's folder: it holds no config.json"


def test_wrong_settings_are_told_with_what_mends_them(folder, built, monkeypatch, tmp_path):
    def mends():
        return [mend for ok, what, mend in report(folder) if not ok and what.startswith("settings: ")]

    monkeypatch.setenv("VATTN_EPSILON", "9")
    assert any("VATTN_EPSILON: got 9" in what for ok, what, _ in report(folder) if not ok)
    assert mends() == ["set the variable named to what is expected, or unset it"]
    file = tmp_path / "settings.yaml"
    monkeypatch.setenv("VATTN_CONFIG", str(file))
    assert mends() == [f"vattn config check {file} shows every mistake of the file with its line"]
    monkeypatch.delenv("VATTN_EPSILON")
    file.write_text("VATTN_EPSILON: 0.1")
    assert mends() == [f"vattn config check {file} shows every mistake of the file with its line"]


def test_settings_that_a_cpu_cannot_serve(folder, built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("VATTN_DENSE_BACKEND", "triton")
    (failed,) = failures(folder)
    assert failed.startswith("settings: dense_backend triton: ")


def test_a_plugin_list_that_leaves_us_out(folder, built, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert any("leaves the plugin out" in what for ok, what, _ in report(folder) if not ok)


def test_no_compiler(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(shutil.which("true")).parent / "nowhere"))
    monkeypatch.delenv("CXX", raising=False)
    wrong = [what for ok, what, _ in report(folder) if not ok]
    assert len(wrong) == 1
    assert "g++" in wrong[0]


def test_settings_that_a_gpu_cannot_serve(folder, monkeypatch, change_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    assert (True, "GPU Test GPU: kernels are compiled as a server starts", "") in report(folder)
    monkeypatch.setenv("VATTN_BOUND", "bernstein")
    (failed,) = failures(folder)
    assert "leave bound at null" in failed
    monkeypatch.delenv("VATTN_BOUND")
    change_config(head_dim=80)
    (failed,) = failures(folder)
    assert "GPU kernels of this version serve" in failed
    change_config(head_dim=64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    (failed,) = failures(folder)
    assert "compute capability 7.5" in failed
