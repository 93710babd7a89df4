"""The whole run on a small model: every row is there, whole, and written as the issue asks."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch

from vattn_kernels import ops, quantiles
from vattn_sgl.config import ConfigError
from vattn_sgl.eval import capture, fidelity, report
from vattn_sgl.eval.fidelity import CAPPED_TARGETS, Fidelity, Plan

NUMBER, RATE = {"type": "number"}, {"type": "number", "minimum": 0, "maximum": 1}
SCHEMA = {
    "type": "object",
    "required": ["rows"],
    "properties": {
        "rows": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": list(report.ROW_KEYS),
                "properties": {
                    "sampler": {"enum": ["proportional", "uniform", "window", "random", "top_k"]},
                    "selector": {"enum": [*ops.SELECTORS, None]},
                    "target": {"enum": [*ops.TARGETS, None]},
                    "bound": {"enum": [*quantiles.BOUNDS, None]},
                    "epsilon": {"type": ["number", "null"]},
                    "delta": {"type": ["number", "null"]},
                    "context": {"type": "integer"},
                    "head_steps": {"type": "integer", "minimum": 1},
                    "bits": {"type": ["integer", "null"]},
                    "density": RATE,
                    "violation_rate": RATE | {"type": ["number", "null"]},
                    "binding_violation_rate": RATE | {"type": ["number", "null"]},
                    "heads_over_delta": {"type": ["integer", "null"], "minimum": 0},
                    "mean_error": NUMBER,
                    "p95_error": NUMBER,
                    "kl": NUMBER,
                    "agreement": RATE,
                    "group": {"enum": ["main", "published", "sweep"]},
                },
            },
        }
    },
}
PLAN = Plan((256, 384), 1, 6, 4, (0.05, 0.2), densities=(0.2,), compared_densities=(0.4,), sweep_context=384,
            sweep_pieces=1, sweep_positions=3, compared_positions=5, forced_positions=3, agreement_positions=4,
            prompts=2, prompt_tokens=200, continuation=6, inefficiency_positions=1, head_samples=2,
            hash_steps=0)  # fmt: skip


@pytest.fixture(scope="module")
def result(small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "load_model", lambda path: small.model)
        patch.setattr(capture, "token_ids", lambda path, *names: small.tokens)
        steps, kept = [], []
        found = Fidelity(Path("small"), PLAN, steps.append, kept.append).run()
    assert [k["rows"] for k in kept] == [found["rows"]]
    assert len(steps) == fidelity.steps(PLAN)
    return found | {"model": "small", "command": "vattn eval fidelity", "date": "2026-01-01"}


def test_rows_are_complete_and_follow_the_schema(result, tmp_path):
    report.write_json(result, tmp_path / "f.json")
    read = json.loads((tmp_path / "f.json").read_text())
    jsonschema.validate(read, SCHEMA)
    main = {(r["selector"], r["bits"], r["context"], r["epsilon"]) for r in read["rows"] if r["target"] == "output"}
    for selector, bits in (("oracle", 0), ("sketch", 64), ("sketch", 128), ("quest", 128), ("sign", 64)):
        for context in PLAN.contexts:
            assert {(selector, bits, context, e) for e in PLAN.epsilons} <= main
    for row, _ in report.groups(result)["main"]:
        few = row["selector"] in ("quest", "sign")
        assert row["head_steps"] == 2 * 6 * (PLAN.other_positions if few else PLAN.positions)
    assert {d["positions"] for _, d in report.groups(result)["main"]} == {PLAN.forced_positions}
    assert all(math.isfinite(r["kl"]) and r["kl"] > -1e-12 for r in read["rows"])


def test_every_method_is_compared_at_every_density(result):
    sweep = [r for r, _ in report.groups(result)["sweep"]]
    coded = len({(r["selector"], r["bits"]) for r in sweep if r["sampler"] == "top_k"})
    assert coded >= 3
    targets = [(sampler, target) for sampler, targets in CAPPED_TARGETS.items() for target in targets]
    methods = [("window", None), ("random", None)] + coded * [("top_k", None), *targets]
    for density, compared in ((0.2, 3), (0.4, 5)):
        rows = [r for r, asked in zip(sweep, result["sweep_density"], strict=True) if asked == density]
        assert Counter((r["sampler"], r["target"]) for r in rows) == Counter(methods)
        assert [r["density"] for r in rows] == pytest.approx([density] * len(rows), abs=0.02)
        for r in rows:
            assert r["head_steps"] == 2 * 6 * (compared if r["target"] in (None, "output") else 3)
        for nothing_claimed in ("epsilon", "delta", "violation_rate", "binding_violation_rate", "heads_over_delta"):
            assert {r[nothing_claimed] for r in rows} == {None}


def test_the_product_is_compared_in_pairs_of_the_same_positions(result):
    pairs = result["sweep_pairs"]
    coded = {(p["selector"], p["bits"]) for p in pairs}
    assert {"oracle", "sketch", "quest", "sign"} == {name for name, _ in coded}
    assert len(pairs) == 2 * len(coded)
    rows = [
        r | {"asked": at} for (r, _), at in zip(report.groups(result)["sweep"], result["sweep_density"], strict=True)
    ]
    for p in pairs:
        assert p["density"] == 0.4
        ours, other = (
            next(
                r for r in rows
                if (r["asked"], r["selector"], r["bits"], r["sampler"]) == (0.4, p["selector"], p["bits"], sampler)
                and r["target"] in ("output", None)
            )
            for sampler in ("proportional", p["against"])
        )  # fmt: skip
        for name in ("kl", "mean_error"):
            assert p[name] == pytest.approx(ours[name] - other[name], abs=1e-9)
        assert p["kl_standard_error"] > 0


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_the_products_rows_are_measured_on_other_texts(index, result):
    other = result["other_texts"][index]
    assert other["text"] == PLAN.other_texts[index]
    found = {(r["selector"], r["bits"], r["context"], r["epsilon"]) for r in other["rows"]}
    coded = [("oracle", 0), ("sketch", 64), ("sketch", 128)]
    assert found == {(*code, context, e) for code in coded for context in PLAN.contexts for e in PLAN.epsilons}
    rows = [r for r, _ in report.groups(result)["main"] if (r["sampler"], r["target"]) == ("proportional", "output")]
    main = {(report.label(r), r["context"], r["epsilon"]): r["density"] for r in rows}
    for row in other["rows"]:
        assert row["head_steps"] == 2 * 6 * PLAN.positions
        # One text stands in for all.
        assert row["density"] == pytest.approx(main[report.label(row), row["context"], row["epsilon"]], rel=0.2)


def test_heads_are_judged_one_by_one(result):
    found = {(h["bits"], h["fresh"]): h for h in result["heads"]}
    assert set(found) == {(64, False), (64, True), (128, False), (128, True)}
    for (bits, is_fresh), h in found.items():
        assert h["steps"] == 2 * 6 * (2 if is_fresh else 5)
        rows = [
            r for r, _ in report.groups(result)["main"] if (r["context"], report.label(r)) == (384, f"sketch {bits}")
        ]
        assert h["density"] == pytest.approx(rows[0]["density"], rel=0.1)
        assert len(h["worst"]) == 3


def test_a_smaller_epsilon_reads_more_and_errs_less(result):
    rows = [r for r, _ in report.groups(result)["main"] if (r["context"], report.label(r)) == (384, "sketch 64")]
    tight, loose = (next(r for r in rows if r["epsilon"] == e and r["sampler"] == "proportional") for e in (0.05, 0.2))
    assert tight["density"] > loose["density"]
    assert tight["mean_error"] < loose["mean_error"]


def test_next_tokens_are_forced_on_the_text_and_on_denses_own(result):
    assert result["agreement"][0]["positions"] == PLAN.agreement_positions
    assert result["continued"]["positions"] == 2 * (PLAN.continuation - 1)
    assert 0.5 < result["continued"]["agreement"] <= 1
    # Dense's own continuation is its most likely one.
    assert result["continued"]["dense_perplexity"] < result["agreement"][0]["dense_perplexity"]


def test_page_and_plots_are_written(result, tmp_path):
    server = [{"epsilon": 0.05, "positions": 3, "density": 0.1, "agreement": 1.0, "kl": 0.0, "perplexity": 2.0,
               "dense_perplexity": 2.0}]  # fmt: skip
    files = report.write(result | {"server": server}, tmp_path)
    assert [f.name for f in files] == ["fidelity.md", "fidelity-violations.png", "fidelity-density.png"]
    text = files[0].read_text()
    for what in ("vattn eval fidelity", "2026-01-01", "seed 0", "0.054", "Through the server", "Binomial".lower(),
                 f"{2 * 6 * PLAN.positions * 2 * 2 * 3:,} with selectors"):  # fmt: skip
        assert what in text
    assert "Not measured: `hash` (no weights of this model were given)." in text
    for file in files[1:]:
        assert file.name in text
        assert 5_000 < file.stat().st_size < 150_000


def test_positions_end_at_the_context():
    positions = fidelity.spread(4096, 128)
    assert len(set(positions)) == 128
    assert positions[-1] == 4095
    assert positions[0] >= 4096 - 4096 // fidelity.TAIL


@pytest.mark.parametrize(("total", "count"), [(128, 32), (128, 24), (6, 4), (6, 5), (6, 6), (6, 9), (6, 1)])
def test_an_even_choice_has_its_count_and_the_last_position(total, count):
    chosen = fidelity.every(torch.arange(total), count)
    assert chosen.numel() == chosen.unique().numel() == min(count, total)
    assert chosen[-1] == total - 1
    assert chosen.diff().numel() == 0 or chosen.diff().max() - chosen.diff().min() <= 1


@pytest.mark.parametrize("density", [0.01, 0.02, 0.05, 0.2])
def test_sink_and_window_leave_room(density):
    fixed, pilot = fidelity.small_settings(density, 4096)
    assert fixed["sink"] + fixed["window"] <= max(3, density * 4096 / 2)
    assert pilot["pilot"] * 4096 + fixed["sink"] + fixed["window"] < density * 4096


def test_texts_too_short_for_a_plan_are_refused(small, monkeypatch, tmp_path):
    small.model.config.save_pretrained(tmp_path)
    monkeypatch.setattr(capture, "token_ids", lambda path, *names: small.tokens)
    fidelity.check(tmp_path, PLAN)
    with pytest.raises(ValueError, match="800 are needed"):
        fidelity.check(tmp_path, replace(PLAN, contexts=(400,), pieces=2))
    with pytest.raises(ValueError, match="1024 positions"):
        fidelity.check(tmp_path, replace(PLAN, contexts=(2048,)))


def test_hash_weights_are_read_before_anything_else(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        fidelity.check(tmp_path, replace(PLAN, hash_weights=str(tmp_path / "none.pt")))
