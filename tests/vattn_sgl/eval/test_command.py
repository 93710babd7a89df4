"""``vattn eval fidelity`` as it is typed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vattn_sgl.cli import app
from vattn_sgl.config import ConfigError, Mistake
from vattn_sgl.eval import command, fidelity, served

RUNNER = CliRunner()


@pytest.fixture
def measured(monkeypatch):
    """The plans that were run; nothing is measured."""
    plans = []

    class Fake:
        def __init__(self, path, plan, step, keep):
            self.keep = keep
            plans.append(plan)

        def run(self):
            result = {"rows": []}
            self.keep(result)
            return result

    monkeypatch.setattr(fidelity, "Fidelity", Fake)
    monkeypatch.setattr(fidelity, "check", lambda path, plan: None)
    monkeypatch.setattr(served, "run", lambda path, quick: [{"epsilon": 0.05}])
    monkeypatch.setattr(command.capture, "token_ids", lambda path, *names: [0] * 10_000)
    return plans


@pytest.fixture
def invoke(small_folder):
    return lambda *arguments: RUNNER.invoke(app, ["eval", "fidelity", "--model", str(small_folder), *arguments])


def test_nowhere_to_write_is_a_mistake(invoke, tmp_path):
    answer = invoke()
    assert answer.exit_code == 2
    assert "--out" in answer.output


def test_json_holds_the_result_and_how_it_was_made(invoke, measured, tmp_path):
    answer = invoke("--quick", "--server", "--json", str(tmp_path / "made" / "f.json"))
    assert answer.exit_code == 0, answer.output
    read = json.loads((tmp_path / "made" / "f.json").read_text())
    assert read["rows"] == [] and read["server"] == [{"epsilon": 0.05}]
    assert set(read) >= {"model", "command", "date"}
    assert measured == [fidelity.QUICK]


def test_contexts_and_text_change_the_plan(invoke, measured, tmp_path):
    wanted = ["--context", "4096", "--context", "1024", "--text", "us-constitution", "--json", str(tmp_path / "f.json")]
    assert invoke(*wanted).exit_code == 0
    (plan,) = measured
    assert (plan.contexts, plan.sweep_context, plan.text, plan.pieces) == ((1024, 4096), 4096, "us-constitution", 2)
    assert "us-constitution" not in plan.other_texts, "it would be counted twice"
    assert invoke("--context", "8192", "--text", "us-constitution", *wanted[6:]).exit_code == 0
    assert (measured[1].pieces, measured[1].sweep_context) == (1, 8192)


def test_hash_weights_are_part_of_the_plan_and_named_when_they_are_wrong(invoke, measured, tmp_path, monkeypatch):
    wanted = ["--quick", "--hash-weights", "w.pt", "--json", str(tmp_path / "f.json")]
    assert invoke(*wanted).exit_code == 0
    assert measured[0].hash_weights == "w.pt"

    def refuse(self):
        raise ConfigError("hash_weights w.pt", [Mistake("layer 0", "missing", "weights of this very model")])

    monkeypatch.setattr(fidelity.Fidelity, "run", refuse)
    answer = invoke(*wanted)
    assert answer.exit_code == 2
    assert "weights of this very model" in answer.output


def test_a_model_that_is_too_short_is_named(invoke, monkeypatch, tmp_path):
    def refuse(path, plan):
        raise ValueError("context 8192 is longer than the model's 2048 positions")

    monkeypatch.setattr(fidelity, "check", refuse)
    answer = invoke("--json", str(tmp_path / "f.json"))
    assert answer.exit_code == 2
    assert "2048 positions" in answer.output


def test_hash_weights_that_are_not_there_are_a_mistake(invoke, tmp_path):
    answer = invoke("--hash-weights", str(tmp_path / "none.pt"), "--json", str(tmp_path / "f.json"))
    assert answer.exit_code == 2
    assert "no such file" in answer.output


def test_what_would_fail_late_is_refused_at_once(measured, small_folder, tmp_path):
    (tmp_path / "file").touch()
    for arguments, told in (
        (("--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")), "holds no config.json"),
        (("--model", str(tmp_path), "--out", str(tmp_path / "file")), "cannot write to"),
        (("--model", str(tmp_path), "--json", str(tmp_path / "file" / "f.json")), "cannot write to"),
        (("--model", str(tmp_path), "--json", str(tmp_path)), "it is a folder"),
    ):
        refused = RUNNER.invoke(app, ["eval", "fidelity", *arguments])
        assert refused.exit_code == 2 and told in " ".join(refused.output.split()), arguments
    assert not measured
