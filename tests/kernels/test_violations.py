"""How often the error exceeds epsilon: the claim ``P(error > epsilon) <= delta``, where it holds and where it does not.

The quick part of `vattn_sgl.eval.proof`, whose whole is ``make prove``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy.stats import binom

from vattn_kernels import dimensions, ops, quantiles
from vattn_sgl.eval import proof
from vattn_sgl.eval.proof import DELTA, POPULATIONS, Cell

CALLS = 8
TRIALS = CALLS * proof.HEADS
MOST = proof.most_violations(TRIALS)
SEEN = POPULATIONS[:-1]
TARGETS = pytest.mark.parametrize("target", ops.TARGETS)
SAMPLERS = pytest.mark.parametrize("sampler", ops.SAMPLERS)
WEAK_SELECTORS = ("quest", "sign", "hash")
# Keys are isotropic here, so a page of `quest` bounds nothing and 64 sign bits say little: what the score misses is
# left to the sample, which misses heavy tokens as the paper's sampler does.
WEAK_WITH = {
    ("heavy-tailed", "quest", "output", "proportional"),
    *(("heavy-tailed", s, target, "uniform") for s in WEAK_SELECTORS for target in ("output", "numerator")),
    *(("gaussian", s, "denominator", "uniform") for s in WEAK_SELECTORS),
}
# sdpa's worst case would read nearly everything at .1, and the test would say nothing.
EPSILON = {"output": 0.1, "denominator": 0.1, "numerator": 0.1, "sdpa": 0.3}


def measure(*cell, **options):
    result = proof.measure(Cell(*cell), CALLS, **options)
    print(f"{result.cell}: {result.rate:.3f} above epsilon, density {result.density:.3f}")
    return result


def test_the_suite_has_its_stated_power():
    """A true rate of delta passes with probability >= .9999, one of 2 delta is caught with >= .9."""
    assert binom.cdf(MOST, TRIALS, DELTA) >= 0.9999
    assert binom.sf(MOST, TRIALS, 2 * DELTA) >= 0.9
    assert proof.detectable_rate(2000) <= 0.08


@pytest.mark.parametrize("selector", ops.SELECTORS)
@TARGETS
@SAMPLERS
@pytest.mark.parametrize("population", SEEN)
def test_violations_are_rarer_than_delta(population, selector, target, sampler):
    """Binomial test of 800 heads at level 1e-4 with the default bound; a rate of 2 delta is caught with power .9."""
    if (sampler, target, population) == ("uniform", "denominator", "heavy-tailed"):
        pytest.skip("known weakness, see test_uniform_sampler_misses_heavy_tails")
    if (population, selector, target, sampler) in WEAK_WITH:
        pytest.skip("known weakness, see test_weak_selectors_leave_heavy_tokens_to_the_sample")
    bound = quantiles.default_bound(sampler, target)
    result = measure(population, selector, sampler, target, bound, EPSILON[target])
    assert not result.exceeds
    assert result.density < 0.7, "nearly everything was read: the test says nothing"


@pytest.mark.parametrize(("population", "selector", "target", "sampler"), sorted(WEAK_WITH))
def test_weak_selectors_leave_heavy_tokens_to_the_sample(population, selector, target, sampler):
    """Known weakness: 10 % of heads fail with ``proportional``, 7-39 % with ``uniform``, at delta 5 %."""
    bound = quantiles.default_bound(sampler, target)
    result = measure(population, selector, sampler, target, bound, EPSILON[target])
    assert result.rate > DELTA
    assert result.rate < (0.25 if sampler == "proportional" else 0.75)
    assert result.pilot_spread > proof.WIDEST_SPREAD


@TARGETS
@SAMPLERS
def test_a_needle_outside_the_top_k_is_lost_to_all_but_bernstein(target, sampler):
    """A quarter of the mass where the codes do not look: ``student`` misses it, ``bernstein`` does not."""
    lost = measure("needle", "sketch", sampler, target, "student", 0.2)
    assert lost.rate > 0.3
    assert lost.silent > 0
    assert lost.pilot_spread > proof.WIDEST_SPREAD
    assert not measure("needle", "oracle", sampler, target, "student", 0.2).exceeds
    assert measure("needle", "sketch", sampler, target, "bernstein", 0.2).violations == 0


@TARGETS
@SAMPLERS
@pytest.mark.parametrize("population", SEEN)
def test_bernstein_is_never_violated(population, target, sampler):
    """Of 800 heads none, where delta allows 40: the bound pays for what it does not know."""
    loose = 1.0 if target == "sdpa" else 0.9
    epsilon = 0.3 if sampler == "proportional" and target != "sdpa" else loose
    result = measure(population, "oracle", sampler, target, "bernstein", epsilon)
    assert result.violations == 0
    assert result.density < (1.0 if target == "sdpa" else 0.95), "everything was read: the test says nothing"


@pytest.mark.parametrize("selector", ops.SELECTORS)
def test_uniform_sampler_misses_heavy_tails(selector):
    """Known weakness of the paper's sampler: a pilot of 40 tokens misses Pareto weights; ``bernstein`` does not."""
    cell = Cell("heavy-tailed", selector, "uniform", "denominator", "student", 0.05)
    student = proof.measure(cell, 20)
    print(f"uniform, student, Pareto weights: {student.rate:.3f} of heads above epsilon at delta {DELTA}")
    assert student.exceeds
    assert student.rate < (0.25 if selector not in WEAK_SELECTORS else 0.6)
    assert student.pilot_spread > proof.WIDEST_SPREAD
    if selector in quantiles.PROVABLE_SELECTORS:
        assert proof.measure(replace(cell, bound="bernstein"), CALLS).violations == 0


@SAMPLERS
def test_needle_with_a_stale_code_is_lost(sampler):
    """Known weakness: half of the mass in one token with a stale code; even ``bernstein`` trusts the code."""
    assert measure("stale needle", "sketch", sampler, "output", "clt", 0.1).rate > 0.5
    assert measure("stale needle", "sketch", "proportional", "output", "bernstein", 0.9).rate > DELTA


def test_f8_holds_in_as_many_dimensions_as_it_is_told():
    """Told of eight, its 1.39 standard errors leave 12-17 % of scalar errors outside."""
    for target, value_dims in (("output", 1), ("denominator", 8)):
        cell = Cell("gaussian", "oracle", "proportional", target, "f8", 0.03, value_dims)
        eight, one = (proof.measure(cell, CALLS, dims=dims) for dims in (dimensions.MOST, dimensions.LEAST))
        print(f"{target}: told of 8 dimensions {eight.rate:.3f}, of 1 {one.rate:.3f} above epsilon")
        assert eight.exceeds
        assert not one.exceeds


@pytest.mark.parametrize("value_dims", [1, 2, 4])
def test_f8_holds_by_dimensions_learnt_from_other_values_of_the_kind(value_dims):
    """A rate of .08 is found with power .9."""
    cell = Cell("gaussian", "sketch", "proportional", "output", "f8", 0.03, value_dims)
    learnt, eight = (proof.measure(cell, CALLS, dims=dims) for dims in (None, dimensions.MOST))
    print(f"{value_dims}: {learnt.rate:.3f} at {learnt.density:.3f}, {eight.rate:.3f} at {eight.density:.3f}")
    assert not learnt.exceeds
    assert learnt.density > eight.density


@pytest.mark.parametrize("selector", ops.SELECTORS)
@SAMPLERS
@pytest.mark.parametrize("population", POPULATIONS)
def test_both_sums_are_unbiased_at_a_fixed_size(population, sampler, selector):
    """1,000 heads; a bias of 6.1 standard errors is found with power .95."""
    for bias in proof.unbiasedness(population, selector, sampler, 10):
        print(bias)
        assert not bias.biased


def test_equal_weights_are_estimated_exactly():
    """The pilot is drawn from the range without the top-k, so it sees no variance because there is none."""
    for bound in ("student", "bernstein"):
        result = measure("equal", "oracle", "uniform", "denominator", bound, 0.02)
        assert result.violations == 0
        assert result.mean_error < 1e-5
        assert result.density < (0.1 if bound == "student" else 0.8)
