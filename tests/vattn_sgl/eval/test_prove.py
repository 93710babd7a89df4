"""``make prove``: the rule of explanation, the report, the exit status."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vattn_sgl.eval import proof, prove
from vattn_sgl.eval.proof import Bias, Cell, Result

CELL = Cell("gaussian", "sketch", "uniform", "output", "student", 0.1)


def result(violations, spread=1.0, **cell):
    return Result(replace(CELL, **cell), 2000, violations, violations // 2, 0.3, 0.04, spread)


def study(*changed):
    results = {cell: Result(cell, 2000, 40, 10, 0.3, 0.04, 1.0) for cell in proof.cells()}
    return results | {r.cell: r for r in changed}


def test_the_test_has_the_level_and_the_power_that_the_report_states():
    assert proof.most_violations(2000) == 138
    assert not result(138).exceeds
    assert result(139).exceeds
    assert proof.detectable_rate(2000) == pytest.approx(0.08, abs=0.003)


@pytest.mark.parametrize(
    ("found", "explanation"),
    [
        (result(250), None),
        (result(250, spread=2.1), "tail"),
        (result(301, spread=2.1), None),
        (result(250, spread=9.0, sampler="proportional"), None),
        (result(250, bound="bernstein"), None),
        (result(250, spread=9.0, bound="bernstein"), None),
        (result(2000, spread=30.0, population="needle"), "needle"),
        (result(2000, spread=30.0, population="needle", selector="oracle"), None),
        (result(2000, population="needle", bound="bernstein"), None),
        (result(250, bound="clt"), "estimated sigma"),
        (result(250, bound="f8"), "no slack"),
        (result(301, bound="f8"), None),
        (result(250, bound="f8", sampler="proportional"), None),
        (result(250, bound="f8", sampler="proportional", value_dims=1), None),
    ],
)
def test_the_rule_of_explanation(found, explanation):
    assert proof.explain(found, study(found)) == explanation


def test_clt_and_f8_are_not_explained_where_student_fails_too():
    student = result(250)
    for bound in ("clt", "f8"):
        assert proof.explain(result(250, bound=bound), study(student)) is None


def test_an_output_that_was_never_written_violates(monkeypatch):
    run = proof.Population.run

    def unwritten(*args):
        out, stats = run(*args)
        return torch.full_like(out, float("nan")), stats

    monkeypatch.setattr(proof.Population, "run", unwritten)
    found = proof.measure(CELL, 1)
    assert found.violations == found.trials
    assert Bias("gaussian", "sketch", "uniform", "D", 1000, float("nan"), float("nan")).biased


def test_every_cell_of_the_matrix_is_there():
    found = list(proof.cells())
    assert len(found) == len(set(found)) == 5 * 2 * 2 * 13 * 4 + 2 * 4 * 4
    assert all(c.target == "output" for c in found if c.bound == "f8")


def run(monkeypatch, tmp_path, capsys, results, mean=0.0):
    biases = [Bias("gaussian", "sketch", "uniform", "D", 1000, mean, 0.001)]
    monkeypatch.setattr(prove, "study", lambda calls, seed: (results, biases))
    status = prove.main(["--output", str(tmp_path)])
    return status, (tmp_path / "proof.md").read_text(), capsys.readouterr().out


def test_a_clean_study_writes_its_report_and_returns_0(monkeypatch, tmp_path, capsys):
    status, text, _ = run(monkeypatch, tmp_path, capsys, study(result(250, spread=7.0)))
    assert status == 0
    assert "**1 of 1,072 cells exceed δ; 0 are unexplained.**" in text
    assert "| gaussian | sketch | uniform | output | student | 0.1 | 12.5 % |" in text
    assert "--calls 20 --seed 0" in text
    for name in ("violations", "density", "tail"):
        assert f"proof/{name}.png" in text
        assert 1_000 < (tmp_path / "proof" / f"{name}.png").stat().st_size < 100_000


def test_an_unexplained_violation_or_a_bias_returns_1(monkeypatch, tmp_path, capsys):
    status, text, out = run(monkeypatch, tmp_path, capsys, study(result(500)))
    assert status == 1
    assert "1 are unexplained" in text
    assert "**unexplained**" in text
    assert "unexplained: Result" in out
    status, text, out = run(monkeypatch, tmp_path, capsys, study(), mean=0.01)
    assert status == 1
    assert "**1 of 1 are biased.**" in text


def test_the_study_measures_every_cell_and_sum(monkeypatch):
    cells = [CELL, replace(CELL, bound="bernstein")]
    monkeypatch.setattr(proof, "cells", lambda: cells)
    monkeypatch.setattr(proof, "POPULATIONS", ("gaussian",))
    results, biases = prove.study(calls=1, seed=0)
    assert list(results) == cells
    assert len(biases) == 8
    assert all(r.trials == proof.HEADS and 0 < r.density <= 1 for r in results.values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--calls", "0"], "expected a whole number of 1 or more"), (["--output", __file__], "cannot write to")],
)
def test_what_would_fail_late_is_refused_at_once(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(prove, "study", lambda calls, seed: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        prove.main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_study_ends_with_a_table_of_what_exceeds_and_why(monkeypatch, tmp_path, capsys):
    _, _, out = run(monkeypatch, tmp_path, capsys, study(result(250, spread=7.0), result(500, bound="f8")))
    rows = [line for line in out.splitlines() if "uniform" in line]
    assert any("student" in row and "tail 1" in row for row in rows)
    assert any("f8" in row and "25.0 %" in row for row in rows)
