"""What the command line refuses before it starts anything."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vattn_sgl import calibrate, cli, demo

OF_A_FOLDER = {
    "calibrate": ["calibrate"],
    "demo": ["demo", "--once", "--model"],
    "fidelity": ["eval", "fidelity", "--quick", "--server", "--json", "f.json", "--model"],
}
named = pytest.mark.parametrize("command", OF_A_FOLDER.values(), ids=OF_A_FOLDER.keys())


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    monkeypatch.setattr(calibrate, "Server", lambda *a, **k: pytest.fail("started"))
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
    result = CliRunner().invoke(cli.app, [*command, str(small_folder)])
    assert result.exit_code == 1
    assert f"{small_folder} has 2048 positions: give a model of at least 8192" in result.stderr


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
