"""What the command line refuses before it starts anything."""

from __future__ import annotations

import socket

import pytest
import torch
from typer.testing import CliRunner

from vattn_sgl import calibrate, cli, demo, model
from vattn_sgl.eval import served
from vattn_sgl.model import ModelError

OF_A_FOLDER = {
    "calibrate": ["calibrate"],
    "demo": ["demo", "--once", "--model"],
    "fidelity": ["eval", "fidelity", "--quick", "--server", "--json", "f.json", "--model"],
}
named = pytest.mark.parametrize("command", OF_A_FOLDER.values(), ids=OF_A_FOLDER.keys())


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    monkeypatch.setattr(calibrate, "Server", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setattr(served, "Server", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setattr(demo, "Server", lambda *a, **k: pytest.fail("started"))


def refused(command, folder):
    """The message of exit status 2."""
    result = CliRunner().invoke(cli.app, [*command, str(folder)])
    assert result.exit_code == 2, (result.output, result.exception)
    return result.stderr


@named
def test_a_folder_without_a_model_is_refused(command, tmp_path):
    assert f"{tmp_path} is not a model's folder: it holds no config.json" in refused(command, tmp_path)


@named
@pytest.mark.parametrize("content", ["[]", '{"model_type": ', "{}", '{"model_type": "none of these"}'])
def test_a_model_whose_config_cannot_be_read_is_refused(content, command, small_folder):
    (small_folder / "config.json").write_text(content)
    message = refused(command, small_folder)
    assert message.startswith(f"{small_folder / 'config.json'}: ")
    assert message.count("\n") == 1


@named
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_model_without_a_tokenizer_is_refused(damage, command, small_folder):
    file = small_folder / "tokenizer.json"
    file.unlink() if damage == "missing" else file.write_text("{")
    message = refused(command, small_folder)
    assert message.startswith(f"the tokenizer of {small_folder} (tokenizer.json and beside it): ")
    assert message.count("\n") == 1


@named
def test_a_model_without_weights_is_refused(command, small_folder):
    (small_folder / "model.safetensors").unlink()
    assert refused(command, small_folder).startswith(f"{small_folder} holds no weights ")


@pytest.mark.parametrize("command", [OF_A_FOLDER["demo"], OF_A_FOLDER["fidelity"]], ids=["demo", "fidelity"])
def test_a_model_of_fewer_positions_than_the_servers_context_is_refused(command, small_folder, change_config):
    change_config(max_position_embeddings=2048)
    assert f"{small_folder} has 2048 positions: give a model of at least 8192" in refused(command, small_folder)


@named
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"architectures": None}, "it names no architectures"),
        ({"num_key_value_heads": 2}, "9 query over 2 KV heads"),
        ({"head_dim": 63}, "head_dim 63: "),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(values, told, command, small_folder, change_config):
    change_config(**values)
    message = refused(command, small_folder)
    assert told in message
    assert message.count("\n") == 1


@named
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"VATTN_LAYERS": "{30: {epsilon: 0.1}}"}, "a layer of this model, 0 to 29"),
        ({"VATTN_SELECTOR": "hash", "VATTN_HASH_WEIGHTS": "/nowhere.pt"}, "no such file"),
        ({"VATTN_PREFILL_BACKEND": "nosuch"}, "prefill_backend 'nosuch' is not a backend of SGLang"),
        ({"VATTN_DENSE_BACKEND": "triton"}, "a CPU reads whole contexts with our own kernel"),
    ],
    ids=["layers", "hash", "prefill", "cpu"],
)
def test_settings_that_a_server_would_refuse_are_told(variables, told, command, small_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert told in refused(command, small_folder)


def test_settings_do_not_matter_to_a_measurement_without_a_server(small_folder, monkeypatch):
    monkeypatch.setenv("VATTN_PREFILL_BACKEND", "nosuch")
    command = [argument for argument in OF_A_FOLDER["fidelity"] if argument != "--server"]
    assert "nosuch" not in refused(command, small_folder)


def test_a_port_in_use_is_told_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(model, "fetch", lambda: pytest.fail("fetched"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli.app, ["demo", "--port", str(port)])
    assert result.exit_code == 2
    assert f"port {port} of 127.0.0.1 is in use: give another one" in result.stderr


def test_a_model_that_cannot_be_made_is_no_mistake_of_the_input(monkeypatch):
    def fail():
        raise ModelError("no network")

    monkeypatch.setattr(model, "fetch", fail)
    result = CliRunner().invoke(cli.app, ["demo"])
    assert (result.exit_code, result.stderr) == (1, "no network\n")


@named
def test_wrong_settings_are_told_before_a_server_starts(command, small_folder, monkeypatch):
    monkeypatch.setenv("VATTN_SINK", "-1")
    monkeypatch.setenv("VATTN_CONFIG", str(small_folder / "none.yaml"))
    message = refused(command, small_folder)
    assert "VATTN_SINK: got -1; expected a whole number" in message
    assert "file: got " in message


@pytest.mark.parametrize("port", ["-5", "0", "65536", "http"])
def test_a_port_that_cannot_be_is_refused(port):
    result = CliRunner().invoke(cli.app, ["demo", "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.stderr
