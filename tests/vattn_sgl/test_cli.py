"""What the command line refuses before it starts anything."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vattn_sgl import cli


@pytest.mark.parametrize("command", [["calibrate"], ["demo", "--model"]], ids=" ".join)
def test_a_folder_without_a_model_is_refused(command, tmp_path):
    result = CliRunner().invoke(cli.app, [*command, str(tmp_path)])
    assert result.exit_code == 2
    assert f"{tmp_path} is not a model's folder: it holds no config.json" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("command", [["calibrate"], ["demo", "--model"]], ids=" ".join)
@pytest.mark.parametrize("content", ["[]", '{"model_type": '])
def test_a_model_whose_config_cannot_be_read_is_refused(content, command, tmp_path):
    (tmp_path / "config.json").write_text(content)
    result = CliRunner().invoke(cli.app, [*command, str(tmp_path)])
    assert result.exit_code == 2
    assert f"{tmp_path / 'config.json'}: " in result.stderr


@pytest.mark.parametrize("port", ["-5", "0", "65536", "http"])
def test_a_port_that_cannot_be_is_refused(port):
    result = CliRunner().invoke(cli.app, ["demo", "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.stderr
