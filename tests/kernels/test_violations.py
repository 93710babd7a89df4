"""How often the error exceeds epsilon: the claim ``P(error > epsilon) <= delta``, where it holds and where it does not.

One call serves `TRIALS` heads, each with its own keys, values and random numbers (the key hashes KV head and length).
Selector ``sketch`` is calibrated on the case itself, 64 bits a key. Values vary in eight dimensions, the number that
bound ``f8`` presumes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from decode_case import DecodeCase
from scipy.stats import binom

from vattn_kernels import ops

DELTA = 0.05
EPSILON = 0.1
BATCH, KV_HEADS, CONTEXT, HEAD_DIM = 30, 16, 1200, 32
TRIALS = BATCH * KV_HEADS
MOST = int(binom.ppf(0.99, TRIALS, DELTA))
WEAK_SELECTORS = ("quest", "sign", "hash")
# Slots lie in random order and keys are isotropic here, so a page of `quest` bounds nothing and 64 sign bits say
# little: what the score misses is left to the sample, which misses heavy tokens as the paper's sampler does.
WEAK_WITH = {
    ("proportional", "output", "quest", "heavy-tailed"),
    ("proportional", "output", "hash", "heavy-tailed"),
    ("proportional", "denominator", "quest", "heavy-tailed"),
    *(("uniform", "output", selector, "heavy-tailed") for selector in WEAK_SELECTORS),
    *(("uniform", "denominator", selector, "gaussian") for selector in WEAK_SELECTORS),
}
POPULATIONS = ("gaussian", "uniform", "heavy-tailed", "all equal")
CERTIFIED = ops.OUTCOMES.index("certified")


def logits(population: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Logits by population; the weights of ``heavy-tailed`` are Pareto with index 1.25, of infinite variance."""
    if population == "gaussian":
        return torch.randn(shape, generator=generator)
    if population == "uniform":
        return 6 * torch.rand(shape, generator=generator) - 3
    if population == "heavy-tailed":
        return -torch.rand(shape, generator=generator).clamp(min=1e-7).log() / 1.25
    return torch.zeros(shape)


@dataclass
class Trials(DecodeCase):
    """Independent heads whose logits follow a population."""

    batch: int = BATCH
    context: int = CONTEXT
    num_qo_heads: int = KV_HEADS
    num_kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    epsilon: float = EPSILON
    delta: float = DELTA
    population: str = "gaussian"
    value_dims: int = 8
    chosen_bound: str = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        g = torch.Generator().manual_seed(self.seed + 1)
        rows = (self.context, self.num_kv_heads)
        directions = torch.linalg.qr(torch.randn(self.head_dim, self.value_dims, generator=g)).Q
        spread = (self.head_dim / self.value_dims) ** 0.5
        self.seq_lens -= torch.arange(self.batch)
        for b, slots in enumerate(self.kv_indices.long()):
            q = self.q[b]
            keys = torch.zeros(*rows, self.head_dim)
            if self.population != "all equal":
                keys = torch.randn(keys.shape, generator=g)
            wanted = logits(self.population, rows, g) / self.step["sm_scale"]
            missing = (wanted - (keys * q).sum(-1)) / q.square().sum(-1)
            self.k_cache[slots] = keys + missing[..., None] * q
            self.v_cache[slots] = 1 + spread * torch.randn(*rows, self.value_dims, generator=g) @ directions.T
        self.index()

    @property
    def bound(self) -> str:
        """Bound under test."""
        return self.chosen_bound

    def fixed_share(self) -> torch.Tensor:
        """Exact ``D_F / D`` of every head, float64 ``[batch, heads]``."""
        rows = []
        for b, n in enumerate(self.seq_lens.tolist()):
            k = self.k_cache[self.kv_indices[b, :n].long()].double()
            p = torch.softmax(torch.einsum("hd,nhd->hn", self.q[b].double(), k) * self.step["sm_scale"], -1)
            rows.append(1 - p[:, self.step["sink"] : n - self.step["window"]].sum(-1))
        return torch.stack(rows)

    def relative_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Error of every head in the target's own norm, and the stats.

        The op's estimate of D follows from its share of the fixed set: ``D / D_exact = exact share / stated share``.
        """
        out, stats, _ = self.run()
        if self.step["target"] == "output":
            return self.errors(out), stats
        stated = 1 - stats[..., ops.STATS.index("residual_mass")].double()
        return (self.fixed_share() / stated - 1).abs(), stats


@functools.cache
def trials(population: str, selector: str, value_dims: int = 8) -> Trials:
    """One population, made once; tests change its settings only."""
    return Trials(population=population, value_dims=value_dims, settings={"selector": selector})


def violations(case: Trials, bound: str, **settings: str) -> tuple[int, torch.Tensor]:
    """Heads whose error exceeds epsilon, and the stats."""
    case.chosen_bound = bound
    case.step |= settings
    errors, stats = case.relative_errors()
    return int((errors > case.epsilon).sum()), stats


def test_the_suite_has_its_stated_power():
    """A true rate of delta passes with probability >= .99, one of 2 delta is caught with >= .9."""
    assert binom.cdf(MOST, TRIALS, DELTA) >= 0.99
    assert binom.sf(MOST, TRIALS, 2 * DELTA) >= 0.9


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("selector", ops.SELECTORS)
@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_violations_are_rarer_than_delta(sampler, target, selector, population):
    """Binomial test of 480 heads at level .01; a rate of 2 delta would be caught with power .9 or more.

    Bound ``f8`` for proportional with target output, ``student`` for the others.
    """
    if (sampler, target, population) == ("uniform", "denominator", "heavy-tailed"):
        pytest.skip("known weakness, see test_uniform_sampler_misses_heavy_tails")
    if (sampler, target, selector, population) in WEAK_WITH:
        pytest.skip("known weakness, see test_weak_selectors_leave_heavy_tokens_to_the_sample")
    bound = "f8" if (sampler, target) == ("proportional", "output") else "student"
    count, stats = violations(trials(population, selector), bound, sampler=sampler, target=target)
    print(f"{count / TRIALS:.3f} of heads above epsilon, density {stats[..., 0].mean():.3f}")
    assert count <= MOST
    assert stats[..., 0].mean() < 0.7, "nearly everything was read: the test says nothing"


@pytest.mark.parametrize("selector", ops.SELECTORS)
def test_uniform_sampler_misses_heavy_tails(selector):
    """Known weakness of the paper's sampler: a pilot of 32 tokens misses Pareto weights: 9-10 % of heads fail.

    Where a weak selector leaves more of them to the pilot, 32-48 %.
    """
    case = trials("heavy-tailed", selector)
    count, _ = violations(case, "student", sampler="uniform", target="denominator")
    print(f"uniform, student, Pareto weights: {count / TRIALS:.3f} of heads above epsilon at delta {DELTA}")
    assert count > MOST
    assert count < (0.25 if selector not in WEAK_SELECTORS else 0.6) * TRIALS


@pytest.mark.parametrize(("sampler", "target", "selector", "population"), sorted(WEAK_WITH))
def test_weak_selectors_leave_heavy_tokens_to_the_sample(sampler, target, selector, population):
    """Known weakness: 7-18 % of heads fail with ``proportional``, 10-61 % with ``uniform``, at delta 5 %."""
    bound = "f8" if (sampler, target) == ("proportional", "output") else "student"
    count, stats = violations(trials(population, selector), bound, sampler=sampler, target=target)
    print(f"{count / TRIALS:.3f} of heads above epsilon, density {stats[..., 0].mean():.3f}")
    assert count > DELTA * TRIALS
    assert count < (0.25 if sampler == "proportional" else 0.75) * TRIALS


@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_needle_that_the_selector_misses_is_lost(sampler):
    """Known weakness: half of the mass in one token with a stale code fails in 95-100 % of heads, 16-70 % certified."""
    case = Trials(seed=1, settings={"selector": "sketch"})
    for b, slots in enumerate(case.kv_indices.long()):
        q, slot = case.q[b], slots[600]
        mass = torch.einsum("hd,nhd->hn", q, case.k_cache[slots]).mul(case.step["sm_scale"]).exp().sum(-1)
        case.k_cache[slot] = q * (mass.log() / case.step["sm_scale"] / q.square().sum(-1))[:, None]
        case.v_cache[slot] = -1
    count, stats = violations(case, "clt", sampler=sampler, target="output")
    unnoticed = (stats[..., ops.STATS.index("outcome")] == CERTIFIED).float().mean()
    print(f"{sampler}, clt, stale needle: {count / TRIALS:.3f} of heads above epsilon, {unnoticed:.3f} certified")
    assert count > 0.5 * TRIALS


@pytest.mark.parametrize(("target", "value_dims"), [("denominator", 8), ("output", 1)])
def test_f8_does_not_hold_for_errors_of_one_dimension(target, value_dims):
    """``f8`` presumes eight dimensions: its 1.39 standard errors leave 12-17 % of scalar errors outside."""
    case = trials("gaussian", "oracle", value_dims)
    count, _ = violations(case, "f8", sampler="proportional", target=target)
    scalar, _ = violations(case, "student", sampler="proportional", target=target)
    print(f"{target}, {value_dims} dimensions: f8 {count / TRIALS:.3f}, student {scalar / TRIALS:.3f} above epsilon")
    assert count > MOST
    assert scalar <= MOST
