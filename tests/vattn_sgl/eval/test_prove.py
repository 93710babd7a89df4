"""``make prove``: the rule of explanation, the report, the exit status."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
        (result(500), None),
        (result(500, spread=2.1), "tail"),
        (result(500, bound="bernstein"), None),
        (result(500, spread=9.0, bound="bernstein"), None),
        (result(500, bound="clt"), "estimated sigma"),
        (result(500, bound="f8"), "no slack"),
    ],
)
def test_the_rule_of_explanation(found, explanation):
    assert proof.explain(found, study(found)) == explanation


def test_clt_and_f8_are_not_explained_where_student_fails_too():
    student = result(500)
    for bound in ("clt", "f8"):
        assert proof.explain(result(500, bound=bound), study(student)) is None


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
    status, text, _ = run(monkeypatch, tmp_path, capsys, study(result(500, spread=7.0)))
    assert status == 0
    assert "**1 of 1,072 cells exceed δ; 0 are unexplained.**" in text
    assert "| gaussian | sketch | uniform | output | student | 0.1 | 25.0 % |" in text
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
