"""Bound ``bernstein`` and target ``sdpa``: the range is provable, the formulas cover, delta changes at runtime."""

from __future__ import annotations

import math

import pytest
import torch
from decode_case import DecodeCase
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from vattn_kernels import ops, params, quantiles, reference, sketch
from vattn_kernels.reference import bernstein, budget, scores
from vattn_kernels.reference import sketch as codes

HALF_WIDTH = ops.STATS.index("half_width")
DENSITY = ops.STATS.index("density")
LOG = quantiles.log_term("bernstein", 0.05)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([32, 64, 128]),
    head_dim=st.sampled_from([32, 64]),
    spread=st.floats(1e-4, 1e4),
    outlier=st.floats(0, 1e4),
    aligned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_logit_and_no_value_exceeds_its_bound(seed, bits, head_dim, spread, outlier, aligned, dtype):
    """Keys unlike those of the calibration, some along what the code misses: the case that Cauchy-Schwarz is about."""
    g = torch.Generator().manual_seed(seed)
    moments = sketch.Moments.zeros(1, 1, head_dim, "cpu")
    calibration = torch.randn(300, 1, head_dim, generator=g)
    moments.add(0, torch.randn(200, 2, head_dim, generator=g) * torch.logspace(0, -2, head_dim), calibration)
    tables = sketch.solve(moments, calibration[None], bits)
    one = (tables.mean[0], tables.key_basis[0], tables.steps[0], tables.fields[0])
    q = torch.randn(2, head_dim, generator=g).to(dtype)
    k = (spread * torch.randn(64, 1, head_dim, generator=g)).to(dtype)
    k[:8] *= 1 + outlier
    side = [torch.zeros(64, 1, bits // 32, dtype=torch.int32), torch.zeros(64, 1, 2, dtype=torch.uint8)]
    valid, slots = torch.zeros(64, dtype=torch.uint8), torch.arange(64)
    ops.encode(k, k, slots, *one, *side, valid)
    if aligned:
        # Move keys along the query's own residual direction without changing what is coded.
        coded = [d for d, (_, _, width) in enumerate(tables.fields[0, 0].tolist()) if width]
        t = q[0].double() @ tables.query_basis[0, 0].double()
        t[coded] = 0
        shift = torch.linalg.solve(tables.key_basis[0, 0].double().T, t / t.norm().clamp(min=1e-9))
        k = (k.double() + spread * shift).to(dtype)
        ops.encode(k, k, slots, *one, *side, valid)
    upper = codes.upper_logits(
        q.double(), side[0][:, 0], side[1][:, 0], tables.mean[0, 0], tables.query_basis[0, 0], tables.steps[0, 0],
        tables.fields[0, 0], head_dim**-0.5,
    )  # fmt: skip
    exact = head_dim**-0.5 * q.double() @ k[:, 0].double().T
    assert (exact <= scores.widened(upper)).all()
    assert (k[:, 0].double().norm(dim=-1) <= codes.upper_norm(side[1][:, 0, 1])).all()


def test_a_nearest_byte_alone_is_no_bound():
    """Half of all norms lie above the value of their byte; half a step above it none does."""
    norms = torch.logspace(-5, 5, 4001, dtype=torch.float64)
    levels = torch.tensor([codes.level(n) for n in norms])
    assert (norms > codes.norm_of(levels)).double().mean() > 0.3
    inside = levels < 255
    assert (norms <= codes.upper_norm(levels))[inside].all()
    assert torch.isinf(codes.upper_norm(torch.tensor([255])))


@pytest.mark.parametrize("dim", [1, 6])
@pytest.mark.parametrize("size", [40, 300, 900])
def test_uniform_bound_covers_a_skewed_population(size, dim):
    """At a fixed size with L = ln(3 / delta): no more violations in 1,000 seeds than a rate of .05 explains at 1e-4."""
    n, seeds, log = 1000, 1000, math.log(3 / 0.05)
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(n, 1, generator=g).double().mul(1.5).exp() * (1 + torch.randn(n, dim, generator=g).double())
    if dim == 1:
        x = x.abs()
    reach = float(x.norm(dim=-1).max()) * (1 if dim == 1 else 2)
    failed, finite = 0, 0
    for _ in range(seeds):
        drawn = x[torch.randperm(n, generator=g)[:size]]
        sigma = float((drawn - drawn.mean(0)).square().sum() / (size - 1)) ** 0.5
        width = bernstein.uniform(sigma, reach, log, size, n)
        finite += math.isfinite(width)
        failed += float((n * drawn.mean(0) - x.sum(0)).norm()) > width
    assert failed <= binom.ppf(1 - 1e-4, seeds, 0.05)
    assert finite == seeds
    assert bernstein.uniform(sigma, reach, log, n, n) == 0


@pytest.mark.parametrize("dim", [1, 6])
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_poisson_bound_covers_a_skewed_population(scale, dim):
    """As above for Poisson sampling with scores that know nothing of the tail."""
    n, seeds, log = 1000, 1000, math.log(3 / 0.05)
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(n, 1, generator=g).double().mul(1.5).exp() * (1 + torch.randn(n, dim, generator=g).double())
    share = torch.rand(n, generator=g).double() / n + 0.2 / n
    chance = (scale * share).clamp(max=1)
    reach = float((x.norm(dim=-1) / chance)[chance < 1].max())
    failed = 0
    for _ in range(seeds):
        inside = torch.rand(n, generator=g).double() < chance
        spread = max(0.0, budget.variance(x[inside].square().sum(-1), 1 / chance[inside], chance[inside])) ** 0.5
        error = float(((x / chance[:, None])[inside].sum(0) - x.sum(0)).norm())
        failed += error > bernstein.poisson(spread, reach, log)
    assert failed <= binom.ppf(1 - 1e-4, seeds, 0.05)


def test_the_table_holds_delta_and_its_half():
    row = torch.tensor(params.pack(0.1, 0.02, "bernstein"), dtype=torch.float64)
    assert row.numel() == params.PARAMS_WIDTH
    assert float(row[params.LOG]) == pytest.approx(math.log(3 * quantiles.LOOKS / 0.02))
    assert float(row[params.SPLIT_LOG]) == pytest.approx(math.log(3 * quantiles.LOOKS / 0.01))
    row = torch.tensor(params.pack(0.1, 0.02, "clt"), dtype=torch.float64)
    assert float(row[params.LOG]) == float(row[params.SPLIT_LOG]) == 0
    assert budget.quantile(row, 50) == pytest.approx(quantiles.quantile("clt", 0.02, 50))
    assert budget.quantile(row, 50, split=True) == pytest.approx(quantiles.quantile("clt", 0.01, 50))


@pytest.mark.parametrize("bound", ["clt", "student", "bernstein"])
@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_delta_changed_at_runtime_changes_the_width(sampler, target, bound):
    """The row is overwritten in place, as the control does between two batches; the pilot alone is read."""
    case = DecodeCase(
        batch=1,
        context=3000,
        epsilon=1.0,
        chosen_bound=bound,
        score_scale=0.3,
        settings={"sampler": sampler, "target": target, "pilot": 0.3, "cap": 0.3},
    )
    arguments = case.arguments()
    row, stats = arguments[12], arguments[18]
    ops.decode(*arguments, **case.step)
    wide = stats[..., HALF_WIDTH].clone()
    row.copy_(torch.tensor(params.pack(1.0, 0.45, bound)))
    ops.decode(*arguments, **case.step)
    assert (stats[..., HALF_WIDTH] < 0.95 * wide).all()
    expected = reference.decode(*case.arguments()[:12], row, case.arguments()[13], **case.step)[1]
    assert torch.allclose(stats[..., HALF_WIDTH].double(), expected[..., HALF_WIDTH], rtol=0.01)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 7.0])
def test_the_split_of_sdpa_is_the_best(ratio):
    """Against a grid of 999 splits of eps1 + eps2 = eps / 2, for both samplers."""
    n, z, epsilon = 4000, 2.24, 0.1
    sigmas = (0.3, 0.3 * ratio)
    grid = [i / 1000 * epsilon / 2 for i in range(1, 1000)]
    best = min(
        max(budget.sample_size(sigmas[0], e, z, n), budget.sample_size(sigmas[1], epsilon / 2 - e, z, n)) for e in grid
    )
    chosen = budget.sample_size(2 * sum(sigmas), epsilon, z, n)
    assert best * 0.99 <= chosen <= best * (1 + 1e-9)
    g = torch.Generator().manual_seed(1)
    share, scale = torch.rand(300, generator=g).double(), 0.3
    squares = [torch.rand(300, generator=g).double() * s**2 for s in sigmas]
    pi, alone = scale * share, torch.zeros(300).double()
    aim = 0.4 * sum(budget.variance(d, 1 / pi, pi) ** 0.5 for d in squares)
    rest = 1 / pi, share, alone, scale
    apart = [[budget.least_scale([d], *rest, i / 200 * aim) for i in range(1, 200)] for d in squares]
    best = min(max(c) for c in zip(apart[0], reversed(apart[1]), strict=True))
    assert best * 0.99 <= budget.least_scale(squares, *rest, aim) <= best * (1 + 1e-9)


@pytest.mark.parametrize("selector", quantiles.PROVABLE_SELECTORS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_upper_bounds_of_every_selector_save_reads(sampler, selector):
    """Keys of a page are alike and scores spread little: what the side data prove is then worth something."""
    case = DecodeCase(
        batch=1,
        context=3000,
        epsilon=0.9,
        chosen_bound="bernstein",
        bits=128,
        score_scale=0.2,
        settings={"sampler": sampler, "selector": selector, "pilot": 0.1},
    )
    out, stats, _ = case.run()
    assert case.errors(out).max() < 0.9
    assert stats[..., DENSITY].max() < 0.7


@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_a_provable_bound_becomes_dense_and_reads_more_than_student(sampler, target):
    density = {}
    for bound in ("student", "bernstein"):
        case = DecodeCase(
            batch=1, context=4000, epsilon=0.3, chosen_bound=bound, settings={"sampler": sampler, "target": target}
        )
        density[bound] = case.run()[1][..., DENSITY].mean()
        case.epsilon = 1e-6
        out, stats, _ = case.run()
        assert case.errors(out).max() < 2e-5
        assert stats[..., DENSITY].min() > 0.99
    assert density["student"] < density["bernstein"]
