"""Counts of a row: who binds, who violates, and what chance allows."""

from __future__ import annotations

import pytest
import torch

from vattn_sgl.eval import metrics
from vattn_sgl.eval.capture import Geometry
from vattn_sgl.eval.inefficiency import spread
from vattn_sgl.eval.metrics import Tally

GEOMETRY = Geometry(1, 4, 2, 8)


def stats_of(half_widths, density=0.25):
    stats = torch.zeros(len(half_widths), 4, 6)
    stats[..., 0], stats[..., metrics.HALF_WIDTH] = density, torch.tensor(half_widths)
    return stats


def test_binding_head_has_the_largest_half_width_of_its_group_or_one_near_epsilon():
    half_widths = torch.tensor([[0.04, 0.05, 0.02, 0.01], [0.0, 0.0, 0.01, 0.05], [0.046, 0.048, 0.05, 0.044]])
    binding = metrics.binding_heads(half_widths, 2, 0.05)
    assert binding.tolist() == [[False, True, True, False], [False, False, False, True], [True, True, True, False]]


def test_tally_counts_violations_of_all_and_of_binding_heads():
    tally = Tally(GEOMETRY, 0.1)
    exact = torch.ones(2, 4, 8, dtype=torch.float64)
    out = exact.clone()
    out[0, 1] *= 1.2
    out[1, 0] *= 0.5
    out[1, 3] *= 1.05
    tally.add(0, out, stats_of([[0.01, 0.1, 0.1, 0.02], [0.02, 0.1, 0.1, 0.02]]), exact)
    row = tally.row(0.05)
    assert row["head_steps"] == 8
    assert row["violation_rate"] == 2 / 8
    assert row["binding_violation_rate"] == 1 / 4
    assert row["density"] == 0.25
    assert row["mean_error"] == pytest.approx((0.2 + 0.5 + 0.05) / 8)
    assert tally.violations.tolist() == [[1, 1, 0, 0]]


def test_heads_over_needs_more_than_chance_gives():
    steps = torch.full((270,), 700)
    assert metrics.heads_over(torch.full((270,), 35), steps, 0.05) == 0
    found = torch.full((270,), 35)
    found[7] = 70
    assert metrics.heads_over(found, steps, 0.05) == 1
    assert metrics.heads_over(found, steps, 0.0) == 0


def test_heads_at_delta_are_rarely_counted_and_twice_delta_is_found():
    draw = torch.Generator().manual_seed(1)
    steps = torch.full((270,), 700)
    counted = [
        metrics.heads_over((torch.rand(270, 700, generator=draw) < 0.05).sum(-1), steps, 0.05) for _ in range(40)
    ]
    assert sum(c > 0 for c in counted) <= 6
    assert metrics.detectable_rate(700, 270, 0.05) < 0.1


def test_inefficiency_is_one_for_exact_scores_and_grows_with_log_error():
    draw = torch.Generator().manual_seed(2)
    a = torch.exp(torch.randn(3000, generator=draw, dtype=torch.float64))
    best = spread(a, a, 0.0)
    rough = [spread(a * torch.exp(s * torch.randn(3000, generator=draw)), a, 0.0) / best for s in (0.3, 1.0)]
    assert 1 < rough[0] < 1.3 < rough[1] < 3


def test_heads_are_pooled_over_texts():
    tallies = [Tally(GEOMETRY, 0.1) for _ in range(2)]
    exact = torch.ones(200, 4, 8, dtype=torch.float64)
    for tally, share in zip(tallies, (0.25, 0.75), strict=True):
        out = exact.clone()
        out[:20, 1] *= 1.2
        tally.add(0, out, stats_of([[0.1] * 4] * 200, share), exact)
    # Neither text alone shows it.
    assert [metrics.heads_over(t.violations, t.steps, 0.06) for t in tallies] == [0, 0]
    found = metrics.each_head(tallies, 0.06)
    assert (found["steps"], found["density"], found["heads_over_delta"]) == (400, 0.5, 1)
    assert found["worst"][0] == {"layer": 0, "head": 1, "rate": pytest.approx(0.1)}
    assert found["violation_rate"] == 40 / 1600
