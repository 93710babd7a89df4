"""HashAttention's weight files: every container, and what is said about a wrong one."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from vattn_sgl.config import ConfigError, Settings
from vattn_sgl.selectors import REGISTRY, CacheGeometry, hash_weights

GEOMETRY = CacheGeometry(2, 50, 2, 16, torch.device("cpu"), num_qo_heads=4)


def layers(bits=64, key_heads=4, query_heads=4, head_dim=16, hidden=24):
    def net(heads):
        shapes = [(head_dim, hidden), (hidden, bits)]
        return [torch.ones(heads, *s) for s in shapes], [torch.ones(heads, s[1]) for s in shapes]

    weights = {}
    for layer in range(2):
        (query, query_bias), (key, key_bias) = net(query_heads), net(key_heads)
        weights[layer] = {"query_matrix": query, "query_bias": query_bias, "key_matrix": key, "key_bias": key_bias}
    return weights


def write(path, weights):
    if path.suffix == ".safetensors":
        flat = {
            f"{layer}.{name}.{index}": tensor.clone()
            for layer, entry in weights.items()
            for name, tensors in entry.items()
            for index, tensor in enumerate(tensors)
        }
        save_file(flat, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=path.suffix != ".old")
    return str(path)


def refusal(path, geometry=GEOMETRY):
    with pytest.raises(ConfigError) as caught:
        hash_weights.nets(hash_weights.load(path), path, geometry, range(2))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".old", ".pkl", ".safetensors"])
def test_every_container_holds_the_same(suffix, tmp_path):
    path = write(tmp_path / f"weights{suffix}", layers())
    nets = hash_weights.nets(hash_weights.load(path), path, GEOMETRY, range(2))
    assert len(nets) == 2
    assert nets[0].query.shape == nets[0].key.shape == (4, 16 * 24 + 24 + 24 * 64 + 64)
    assert nets[0].query_widths.tolist() == [16, 24, 64]
    assert hash_weights.words_per_kv_head(path, 2) == 4


@pytest.mark.parametrize("suffix", [".pt", ".old", ".pkl"])
def test_weights_saved_on_a_gpu_are_read_without_one(suffix, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = write(tmp_path / f"weights{suffix}", layers())
    assert hash_weights.load(path)[0]["key_matrix"][0].device.type == "cpu"


def test_a_pickle_may_hold_parameters(tmp_path):
    weights = layers()
    weights[0]["key_matrix"] = [torch.nn.Parameter(matrix) for matrix in weights[0]["key_matrix"]]
    path = write(tmp_path / "weights.pkl", weights)
    assert hash_weights.load(path)[0]["key_matrix"][0].shape == (4, 16, 24)


def test_layers_of_unlike_key_nets_are_refused(tmp_path):
    weights = layers()
    weights[1] = layers(key_heads=2)[1]
    assert "key nets: got [2, 4]; expected as many in every layer" in refusal(write(tmp_path / "w.pt", weights))


def test_key_nets_of_kv_heads_share_a_signature(tmp_path):
    path = write(tmp_path / "weights.pt", layers(key_heads=2))
    assert hash_weights.words_per_kv_head(path, 2) == 2
    assert hash_weights.nets(hash_weights.load(path), path, GEOMETRY, range(2))[1].key.shape[0] == 2


def test_a_pickle_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({0: Trap()}))
    assert "builtins.print, which weights do not need" in refusal(str(path))


def test_a_missing_file_is_named(tmp_path):
    message = refusal(str(tmp_path / "none.pt"))
    assert "none.pt" in message
    assert "no such file" in message


@pytest.mark.parametrize("content", [b"", b"nonsense", b"}]K\x01s.", pickle.dumps([1])])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    assert "expected" in refusal(str(path))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bits": 48}, "bits of query_matrix: got 48; expected 32 to 128 bits"),
        ({"bits": 256}, "bits of key_matrix: got 256"),
        ({"query_heads": 2}, "heads of query_matrix: got 2; expected 4 of the model"),
        ({"key_heads": 3}, "heads of key_matrix: got 3; expected 2 or 4 of the model"),
        ({"head_dim": 32}, "take head_dim 16"),
        ({"hidden": 600}, "widths of query_matrix: got 600; expected at most 512"),
    ],
)
def test_what_does_not_fit_the_model_is_named_in_every_layer(change, expected, tmp_path):
    message = refusal(write(tmp_path / "weights.pt", layers(**change)))
    assert expected in message
    assert "layer 0" in message
    assert "layer 1" in message


def test_numbers_that_are_none_are_refused(tmp_path):
    weights = layers()
    weights[1]["key_bias"][0][0, 0] = float("nan")
    assert "layer 1: key_matrix or key_bias" in refusal(write(tmp_path / "nan.pt", weights))


def test_missing_layers_and_lists_are_named(tmp_path):
    weights = layers()
    del weights[1]
    assert "layer 1: got 'missing, the file has layers 0 to 0'" in refusal(write(tmp_path / "one.pt", weights))
    weights = layers()
    del weights[0]["key_bias"]
    weights[1]["query_matrix"] *= 4
    message = refusal(write(tmp_path / "two.pt", weights))
    assert "2 mistake(s)" in message
    assert "query_matrix: 8" in message


def test_layers_that_are_no_numbers_are_named(tmp_path):
    message = refusal(write(tmp_path / "named.pt", {"0": layers()[0]}))
    assert "layer '0': got 'str'; expected a layer's number" in message


def test_biases_of_another_shape_are_named(tmp_path):
    weights = layers()
    weights[0]["key_bias"][1] = torch.ones(4, 32)
    assert "layer 0: key_bias" in refusal(write(tmp_path / "weights.pt", weights))


def test_the_selector_refuses_at_start(tmp_path):
    path = write(tmp_path / "weights.pt", layers(query_heads=2))
    settings = Settings(selector="hash", hash_weights=path)
    with pytest.raises(ConfigError, match="expected 4 of the model"):
        REGISTRY["hash"](settings, GEOMETRY, range(2), "model")


def test_another_file_is_another_calibration(tmp_path):
    stores = []
    for bits in (64, 64, 32):
        path = write(tmp_path / "weights.pt", layers(bits=bits, hidden=20 + len(stores)))
        settings = Settings(selector="hash", hash_weights=path)
        stores.append(REGISTRY["hash"](settings, GEOMETRY, range(2), "model").calibration.store.path)
    assert len(set(stores)) == 3
