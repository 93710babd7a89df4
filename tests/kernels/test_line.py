"""The calibrated line: least sampling cost, flat where the score is useless."""

from __future__ import annotations

import pytest
import torch

from vattn_kernels import line


def case(noise, heavy=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(48, 1000, generator=g)
    logits[:, :3] += heavy
    raw = 2 * logits + noise * torch.randn(48, 1000, generator=g)
    return raw, torch.ones(48, 1000), logits


def cost(weights, raw, unit, logits):
    return float(line.inefficiency(logits, line.apply(weights, raw, unit, torch.zeros(48))).mean())


def test_exact_scores_cost_nothing_and_their_slope_and_level_are_found():
    raw, unit, logits = case(0.0)
    weights = line.fit(raw + 3.0, unit, logits)
    assert weights[line.SLOPE] == pytest.approx(0.5, abs=0.01)
    # The unit is constant here, so the offset is the level's to say.
    level = weights[line.LEVEL] + weights[line.OFFSET] + 3.0 * weights[line.SLOPE]
    assert float(level) == pytest.approx(0.0, abs=0.05)
    assert cost(weights, raw + 3.0, unit, logits) < 1e-3


@pytest.mark.parametrize("heavy", [0.0, 4.0])
@pytest.mark.parametrize("noise", [1.0, 3.0, 10.0])
def test_never_worse_than_flat_nor_than_least_squares(noise, heavy):
    raw, unit, logits = case(noise, heavy)
    weights = line.fit(raw, unit, logits)
    squares = torch.linalg.lstsq(torch.stack([raw.flatten(), unit.flatten()], 1), logits.flatten()[:, None]).solution
    least = torch.tensor([0.0, float(squares[0]), float(squares[1])])
    fitted = cost(weights, raw, unit, logits)
    assert fitted <= cost(torch.zeros(3), raw, unit, logits)
    assert fitted <= cost(least, raw, unit, logits) + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_a_useless_score_is_flat_on_other_data_too(seed):
    """Scores independent of the logits: on fresh data the line costs at most 2 % more than uniform sampling."""
    g = torch.Generator().manual_seed(seed)
    raw = 5 * torch.randn(48, 1000, generator=g)
    weights = line.fit(raw, torch.ones_like(raw), 1.5 * torch.randn(48, 1000, generator=g))
    fresh, logits = 5 * torch.randn(48, 1000, generator=g), 1.5 * torch.randn(48, 1000, generator=g)
    flat = cost(torch.zeros(3), fresh, torch.ones_like(fresh), logits)
    assert cost(weights, fresh, torch.ones_like(fresh), logits) < flat + 0.02


def test_a_score_that_runs_the_wrong_way_gets_no_slope():
    raw, unit, logits = case(0.5)
    assert line.fit(-raw, unit, logits)[line.SLOPE] == 0


def test_the_level_makes_the_scores_sum_to_the_weights():
    raw, unit, logits = case(2.0, 3.0)
    scores = line.apply(line.fit(raw, unit, logits), raw, unit, torch.zeros(48))
    gap = (scores.logsumexp(-1) - logits.logsumexp(-1)).mean()
    assert float(gap) == pytest.approx(0, abs=1e-4)


def test_equal_logits_and_equal_scores_stay_finite():
    flat = torch.zeros(4, 32)
    assert torch.isfinite(line.fit(flat, flat, flat)).all()
    assert torch.isfinite(line.fit(flat, flat + 1, 1e4 * torch.randn(4, 32))).all()
