"""The reference itself: random numbers, unbiasedness, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from decode_case import DecodeCase
from scipy import stats as distributions

from vattn_kernels import ops, params, quantiles, reference
from vattn_kernels.reference import budget, proportional, rng, scores
from vattn_kernels.reference.estimate import MOST_SHARE, Head, estimate, shrunk


def test_permutation_is_a_bijection():
    for n in [*range(1, 301), 1023, 1024, 1025, 4097, 65537]:
        assert torch.equal(rng.permutation(n, key=n * 7919).sort().values, torch.arange(n)), n


def test_permutations_of_different_keys_differ():
    first = [rng.permutation(1000, key)[:50] for key in range(20)]
    assert len({tuple(p.tolist()) for p in first}) == 20


def test_first_image_is_uniform():
    """Chi-square of the first image over 8,000 keys and 40 values; level .001."""
    images = torch.tensor([int(rng.permutation(40, rng.stream_key(0, 0, 0, n))[0]) for n in range(8000)])
    counts = torch.bincount(images, minlength=40)
    assert distributions.chisquare(counts.numpy()).pvalue > 0.001


def test_uniforms_are_uniform_and_keys_independent():
    """Chi-square over 100 bins and 200,000 draws; correlation of two keys below five standard errors."""
    positions = torch.arange(200_000)
    u = rng.uniform(positions, rng.stream_key(1, 2, 0, 777))
    other = rng.uniform(positions, rng.stream_key(1, 2, 1, 777))
    assert u.min() >= 0 and u.max() < 1
    assert distributions.chisquare(torch.histc(u, 100, 0, 1).numpy()).pvalue > 0.001
    assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 5 / 200_000**0.5


def test_the_last_bits_of_uniforms_are_uniform():
    """Chi-square over the last nine of 23 bits; one that 51 % of draws have set is found with power above .99."""
    u = rng.uniform(torch.arange(1 << 20), rng.stream_key(1, 2, 0, 777))
    bits = (u * 2**23).long()
    assert torch.equal(bits.double() * 2.0**-23, u)
    assert distributions.chisquare(torch.bincount(bits % 512, minlength=512).numpy()).pvalue > 0.001


@pytest.mark.parametrize("population", ["gaussian", "duplicated maximum", "one heavy token", "all equal"])
@pytest.mark.parametrize("kind", ["good scores", "bad scores"])
def test_poisson_estimate_is_unbiased(population, kind):
    """Mean of D and Nv over 4,000 seeds within 4.5 standard errors of the exact sums, at fixed scales of two heads."""
    n, dim, seeds, scales = 400, 4, 4000, torch.tensor([60.0, 20.0]).double()
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(n, generator=g).double()
    if population == "duplicated maximum":
        logits[:20] = 3.0
    elif population == "one heavy token":
        logits[7] = 7.0
    elif population == "all equal":
        logits[:] = 0.5
    values = torch.randn(n, dim, generator=g).double()
    guess = logits if kind == "good scores" else torch.randn(n, generator=g).double()
    usable = torch.ones(n, dtype=torch.bool)
    share = torch.softmax(torch.stack([guess, guess.flip(0)]), 1)
    likely = scores.intensity(scores.floored(share, usable, 0.05), scales)
    d, nv = torch.zeros(seeds).double(), torch.zeros(seeds, dim).double()
    for seed in range(seeds):
        inside = rng.uniform(torch.arange(n), rng.stream_key(seed, 0, 0, n)) < likely
        weighted = inside / likely.clamp(max=1) * logits.exp()
        d[seed], nv[seed] = weighted.sum(), weighted @ values
    exact = torch.cat([logits.exp().sum()[None], logits.exp() @ values])
    drawn = torch.cat([d[:, None], nv], 1)
    error = drawn.std(0) / seeds**0.5
    assert ((drawn.mean(0) - exact).abs() <= 4.5 * error + 1e-9 * exact.abs()).all()


@pytest.mark.parametrize("size", [1, 40, 399, 400])
def test_uniform_sample_is_unbiased_and_distinct(size):
    """As above for the first ``size`` images of the permutation; without replacement, so size = N is exact."""
    n, seeds = 400, 2000
    y = torch.randn(n, generator=torch.Generator().manual_seed(1)).double().exp()
    sums = torch.zeros(seeds).double()
    for seed in range(seeds):
        drawn = rng.permutation(n, rng.stream_key(seed, 1, 0, n))[:size]
        assert drawn.unique().numel() == size
        sums[seed] = n / size * y[drawn].sum()
    assert abs(float(sums.mean() - y.sum())) <= 4.5 * float(sums.std()) / seeds**0.5 + 1e-9 * float(y.sum())


def test_variance_formula_matches_the_spread():
    """Relative gap of V(c) and the empirical variance of D over 6,000 seeds: below five standard errors (9 %)."""
    n, seeds, scale = 300, 6000, 80.0
    logits = torch.randn(n, generator=torch.Generator().manual_seed(5)).double()
    share, usable = torch.full((1, n), 1 / n).double(), torch.ones(n, dtype=torch.bool)
    likely = scores.intensity(scores.floored(share, usable, 0.05), torch.tensor([scale]).double())
    sums, variances = torch.zeros(seeds).double(), torch.zeros(seeds).double()
    for seed in range(seeds):
        inside = rng.uniform(torch.arange(n), rng.stream_key(seed, 2, 0, n)) < likely
        pi = likely[inside].clamp(max=1)
        sums[seed] = (logits.exp()[inside] / pi).sum()
        variances[seed] = budget.variance(logits[inside].exp().square(), 1 / pi, pi)
    assert float(variances.mean() / sums.var()) == pytest.approx(1, abs=5 * (2 / seeds) ** 0.5)


def misled(seed: int) -> tuple[Head, torch.Tensor, torch.Tensor]:
    """A head with heavy-tailed weights, and a tenth of its tokens by scores that know little of them."""
    n, g = 500, torch.Generator().manual_seed(seed)
    logits, values = 2 * torch.randn(n, generator=g).double(), torch.randn(n, 8, generator=g).double()
    fixed = torch.zeros(n, dtype=torch.bool)
    fixed[:4] = True
    guess = 0.5 * logits + 1.2 * torch.randn(n, generator=g).double()
    likely = (torch.softmax(guess, 0) * 0.1 * n).clamp(1e-3, 1) * ~fixed
    read = (torch.rand(n, generator=g).double() < likely).nonzero()[:, 0]
    return Head(logits, values, fixed), read, 1 / likely[read]


def test_a_shrunk_estimate_lies_between_what_was_read_and_the_unbiased_one():
    head, read, weight = misled(1)
    unbiased = estimate(head, read, weight, "output")
    mass = (head.logits[read] - unbiased.maximum).exp()
    stands_for = (weight - 1) * mass
    most = MOST_SHARE * ((head.logits[head.fixed] - unbiased.maximum).exp().sum() + weight @ mass)
    assert bool((stands_for > most).any()) and not bool((stands_for > most).all())
    truncated = 1 + torch.minimum(stands_for, most) / mass
    plain, drawn = (estimate(head, read, w, "output").out for w in (torch.ones_like(weight), truncated))
    found = shrunk(head, unbiased, read, weight)
    kept = (found - plain) @ (drawn - plain) / (drawn - plain).square().sum()
    assert 0 < kept < 1
    assert torch.allclose(found, plain + kept * (drawn - plain))
    everything = torch.arange(4, 500)
    whole = estimate(head, everything, torch.ones(496).double(), "output")
    assert torch.equal(shrunk(head, whole, everything, torch.ones(496).double()), whole.out)


def test_a_cap_gives_most_of_what_it_leaves_to_the_best_scores():
    g = torch.Generator().manual_seed(3)
    score, scales, cap = torch.rand(2, 400, generator=g).double() + 0.01, torch.tensor([0.05, 0.1]).double(), 0.2
    before = scores.intensity(score, scales).clamp(max=1).sum()
    ranked = proportional.ranked(score, scales, cap)
    best = ranked[0] == scores.INFINITE
    assert int(best.sum()) == int(2 / 3 * (0.2 * 400 - before))
    assert float(score.amax(0)[best].min()) >= float(score.amax(0)[~best].max())
    assert torch.equal(ranked[:, ~best], score[:, ~best])
    assert torch.equal(proportional.ranked(score, 100 * scales, cap), score)
    within, cut = proportional.limit(ranked, scales, 1e6 + scales, cap)
    assert cut
    assert float(scores.intensity(ranked, within).clamp(max=1).sum()) == pytest.approx(0.2 * 400, abs=1e-3)


def test_a_shrunk_estimate_errs_less_where_scores_mislead():
    """Mean squared error over 400 heads: below the unbiased and the unweighted estimate's by three standard errors."""
    errors = []
    for seed in range(400):
        head, read, weight = misled(seed)
        exact = torch.softmax(head.logits, 0) @ head.values
        unbiased = estimate(head, read, weight, "output")
        plain = estimate(head, read, torch.ones_like(weight), "output").out
        outs = torch.stack([shrunk(head, unbiased, read, weight), unbiased.out, plain])
        errors.append((outs - exact).square().sum(-1))
    e = torch.stack(errors)
    for other in (1, 2):
        gap = e[:, other] - e[:, 0]
        assert float(gap.mean()) > 3 * float(gap.std()) / 400**0.5


@pytest.mark.parametrize("help_", [0.0, 0.2])
def test_least_scale_is_least(help_):
    g = torch.Generator().manual_seed(9)
    deviation2, share = torch.rand(200, generator=g).double(), torch.rand(200, generator=g).double()
    scale, others = 0.3, help_ * torch.rand(200, generator=g).double()

    def pi(c: float) -> torch.Tensor:
        return torch.maximum(others, c * share).clamp(max=1)

    weight = 1 / pi(scale)
    now = budget.variance(deviation2, weight, pi(scale)) ** 0.5
    for aim in (0.9 * now, 0.3 * now, 0.01 * now):
        c = budget.least_scale([deviation2], weight, share, others, scale, aim)
        assert budget.variance(deviation2, weight, pi(c)) <= aim**2 * (1 + 1e-9)
        assert budget.variance(deviation2, weight, pi(0.999 * c)) > aim**2
    assert budget.least_scale([deviation2], weight, share, others, scale, 1.1 * now) == scale


def test_scales_of_a_group_meet_their_aims_beside_each_other():
    """Half-widths by what was read lie between .9 and 1.05 of epsilon; a certified head keeps its scale."""
    g = torch.Generator().manual_seed(4)
    share, scales = torch.rand(3, 400, generator=g).double() ** 4, torch.tensor([0.3, 0.3, 0.3]).double()
    weight = 1 / scores.intensity(share, scales).clamp(max=1)
    deviations = share.square() * torch.rand(3, 400, generator=g).double() * torch.tensor([[1.0], [4.0], [1.0]])

    def width(head: int, at: torch.Tensor) -> float:
        return budget.variance(deviations[head], weight, scores.intensity(share, at).clamp(max=1)) ** 0.5

    epsilon = 0.3 * width(0, scales)
    wants = [proportional.Want([deviations[h]], 0.0, h < 2) for h in range(3)]
    solved = proportional.solve(wants, weight, share, scales, 1.0, epsilon)
    assert all(0.9 * epsilon <= width(h, solved) <= 1.05 * epsilon for h in range(2))
    assert solved[2] == scales[2]
    assert solved[1] > solved[0] > scales[0]


@pytest.mark.parametrize("bound", quantiles.BOUNDS)
@pytest.mark.parametrize("nu", [2.0, 3.7, 16.0, 100.0, float("inf")])
def test_table_is_the_quantile_or_above_it(bound, nu):
    row = torch.tensor(params.pack(0.05, 0.05, bound))
    exact = quantiles.quantile(bound, 0.05, nu)
    assert exact * (1 - 1e-6) <= budget.quantile(row, nu) <= exact * 1.02


def test_published_quantiles():
    assert quantiles.quantile("f8", 0.05, float("inf")) == pytest.approx(1.39, abs=0.005)
    assert quantiles.quantile("f8", 0.05, 16) == pytest.approx(1.61, abs=0.005)
    assert quantiles.quantile("clt", 0.05, 1) == pytest.approx(1.96, abs=0.001)
    with pytest.raises(ValueError, match="unknown bound"):
        quantiles.quantile("chebyshev", 0.05, 1)


@pytest.mark.parametrize("bound", ["student", "clt"])
def test_quantiles_of_rare_failures_are_not_lost_to_rounding(bound):
    assert 1.01 < quantiles.quantile(bound, 1e-20, 8) / quantiles.quantile(bound, 1e-18, 8) < 10


def test_finite_population_correction():
    assert budget.sample_size(1.0, 1e-12, 2.0, 1000) == pytest.approx(1000)
    assert budget.sample_size(0.0, 1.0, 2.0, 1000) == 0
    small = budget.sample_size(1.0, 1000.0, 2.0, 1000)
    assert small == pytest.approx(1000 * 4 / 1004)


@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_reference_becomes_dense(sampler):
    case = DecodeCase(batch=1, context=300, num_qo_heads=2, num_kv_heads=1, epsilon=1e-7, settings={"sampler": sampler})
    out, _ = reference.decode(*case.arguments()[:14], **case.step)
    assert case.errors(out).max() < 1e-6


def test_ratio_estimate_with_everything_read_is_exact():
    g = torch.Generator().manual_seed(2)
    logits, values = torch.randn(50, generator=g).double(), torch.randn(50, 8, generator=g).double()
    fixed = torch.arange(50) < 10
    result = estimate(Head(logits, values, fixed), torch.arange(10, 50), torch.ones(40).double(), "output")
    assert torch.allclose(result.out, torch.softmax(logits, 0) @ values)


@pytest.mark.parametrize("overrated", [0.0, 6.0])
def test_the_guard_is_relative_to_the_mass_that_was_read(overrated):
    """However much the scores overrate their own mass, every token above the guard's share is read for certain."""
    n, epsilon = 4000, 0.1
    g = torch.Generator().manual_seed(2)
    logits, values = 1.5 * torch.randn(n, generator=g).double(), 1 + torch.randn(n, 8, generator=g).double()
    fixed = torch.zeros(n, dtype=torch.bool)
    fixed[:4] = True
    inner, log_mass = slice(4, n), float(logits.logsumexp(0))
    head = Head(logits, values, fixed, estimated_mass=log_mass + overrated)
    share = (logits[inner] - log_mass - overrated).exp() * values[inner].norm(dim=-1)
    score = scores.floored(share[None], torch.ones(n - 4, dtype=torch.bool), 0.01)
    draws = rng.uniform(torch.arange(4, n), rng.stream_key(0, 0, 0, n))
    row = torch.tensor(params.pack(epsilon, 0.05, "f8"))
    drawn = proportional.sample([head], score, draws, 4, row, "output", 80 / float(share.sum()), 1.0)
    norm = float((logits.softmax(0) @ values).norm())
    above = (share * math.exp(overrated) > 1.1 * epsilon / budget.GUARD_SHARE * norm).nonzero()[:, 0] + 4
    assert above.numel() > 5
    assert torch.isin(above, drawn.read).all()
    assert (drawn.weight[torch.isin(drawn.read, above)] == 1).all()
    assert drawn.read.numel() < n / 2
