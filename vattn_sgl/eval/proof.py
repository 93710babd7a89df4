"""The statistical proof: unbiased sums, and ``P(error > epsilon) <= delta``, with a stated power.

A `Population` holds independent heads with known logits. One call of the op serves all of them, each with its own
random numbers, because the key hashes the length and every head has a length of its own; calls with other seeds are
independent again. A head-step is a trial. Errors are in the target's own norm, against float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from scipy.stats import binom

from vattn_kernels import dimensions, line, ops, pages, params, signature
from vattn_kernels.quantiles import BOUNDS_OF_TARGET
from vattn_kernels.reference import quest, scores, sketch, uniform
from vattn_kernels.reference import signature as signatures
from vattn_kernels.sketch import GAUSSIAN_STEPS, Moments
from vattn_sgl.config import Settings

DEFAULTS = Settings()
DELTA = DEFAULTS.delta
LEVEL = 1e-4
POWER = 0.95
EPSILONS = (0.02, 0.05, 0.1, 0.2)
POPULATIONS = ("gaussian", "uniform", "equal", "heavy-tailed", "needle")
# Selectors of the study: scores that are good, and scores that are exact. The others see little in isotropic keys.
SELECTORS = ("sketch", "oracle")
HEADS, CONTEXT, HEAD_DIM = 100, 2048, 32
CODED, WIDTH, WORDS = 12, 5, 2
SIGNATURE_BITS, CALIBRATION_KEYS = 64, 512
# Log-error of the estimated weights, and reach of the query into what the codes leave out, both in nats.
BLUR, HIDDEN, NEEDLE_HIDDEN = 0.4, 1.8, 6.8
# Beyond so many times the spread of normal summands, bounds that rest on the pilot's variance lose their ground.
WIDEST_SPREAD = 2.0
# Rates above so many times delta are explained by nothing but a needle.
MOST_DELTAS = 3
# In which the values vary; what ``f8`` is made for.
VALUE_DIMS = 8
MOST_ERRORS, ROUNDING = 4.5, 2e-6
CERTIFIED, CAPPED = ops.OUTCOMES.index("certified"), ops.OUTCOMES.index("capped")


def logits(population: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Logits by population; the weights of ``heavy-tailed`` are Pareto with index 1.25, of infinite variance."""
    if population == "gaussian":
        return torch.randn(shape, generator=generator)
    if population == "uniform":
        return 6 * torch.rand(shape, generator=generator) - 3
    if population == "heavy-tailed":
        return -torch.rand(shape, generator=generator).clamp(min=1e-7).log() / 1.25
    return torch.zeros(shape)


@dataclass(eq=False)
class Population:
    """Heads of one kind: a cache whose logits are known, its sketch, and the exact attention.

    The first `CODED` dimensions of a key are coded with `WIDTH` bits, the others are not: there the query reaches
    ``hidden`` nats, of which a token usually gets a random share of deviation `BLUR`. The needle of ``needle`` gets all
    of it: a token with a quarter of the mass whose code is like everybody's, and whose norm byte is honest.

    Attributes
    ----------
    name : str
        One of `POPULATIONS`, or ``stale needle``: ``gaussian`` with a token of half the mass written after its code.
    seed : int
        Of the data.
    value_dims : int
        Dimensions in which values vary; their mean is a vector of ones.
    heads, context : int
        Independent heads, and the longest of their lengths.
    """

    name: str
    seed: int = 0
    value_dims: int = VALUE_DIMS
    heads: int = HEADS
    context: int = CONTEXT

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed * 1000 + sum(map(ord, self.name)))
        rows = (self.heads, self.context)
        hidden = NEEDLE_HIDDEN if self.name == "needle" else HIDDEN
        coded = torch.nn.functional.normalize(torch.randn(self.heads, 1, CODED, generator=g), dim=-1)
        rest = torch.nn.functional.normalize(torch.randn(self.heads, 1, HEAD_DIM - CODED, generator=g), dim=-1)
        keys = torch.zeros(*rows, HEAD_DIM)
        if self.name != "equal":
            k = torch.randn(*rows, CODED, generator=g)
            wanted = logits(self.name.replace("stale needle", "gaussian"), rows, g)
            keys[..., :CODED] = k + (wanted - (k * coded).sum(-1))[..., None] * coded
            k = torch.randn(*rows, HEAD_DIM - CODED, generator=g)
            k = torch.nn.functional.normalize(k - (k * rest).sum(-1, keepdim=True) * rest, dim=-1)
            share = BLUR / hidden * torch.randn(*rows, 1, generator=g)
            keys[..., CODED:] = torch.nn.functional.normalize(k + share * rest, dim=-1)
        self.q = torch.cat([coded, hidden * rest], -1)
        directions = torch.linalg.qr(torch.randn(HEAD_DIM, self.value_dims, generator=g)).Q
        spread = (HEAD_DIM / self.value_dims) ** 0.5
        values = 1 + spread * torch.randn(*rows, self.value_dims, generator=g) @ directions.T
        place = torch.randint(self.context // 4, self.context // 2, (self.heads,), generator=g)
        each = torch.arange(self.heads)
        if self.name == "needle":
            keys[each, place, CODED:] = rest[:, 0]
            values[each, place] = -1.0
        self.k_cache = keys.view(-1, 1, HEAD_DIM).contiguous()
        self.v_cache = values.view(-1, 1, HEAD_DIM).contiguous()
        self.slots = torch.arange(self.heads * self.context, dtype=torch.int32).view(rows)
        self.seq_lens = self.context - torch.arange(self.heads)
        self._encode()
        if self.name == "stale needle":
            mass = torch.einsum("hnd,hd->hn", keys, self.q[:, 0]).exp().sum(-1)
            keys[each, place] = self.q[:, 0] * (mass.log() / self.q[:, 0].square().sum(-1))[:, None]
            values[each, place] = -1.0
        self._solve()

    def _encode(self) -> None:
        slots = self.heads * self.context
        places = [[d // 6, d % 6 * WIDTH, WIDTH] for d in range(CODED)]
        self.tables = {
            "mean": torch.zeros(1, HEAD_DIM),
            "basis": torch.eye(HEAD_DIM)[None],
            "steps": torch.full((1, CODED), GAUSSIAN_STEPS[WIDTH - 1]),
            "fields": torch.tensor([places], dtype=torch.int32),
        }
        self.codes = torch.zeros(slots, 1, WORDS, dtype=torch.int32)
        self.norms = torch.zeros(slots, 1, 2, dtype=torch.uint8)
        self.valid = torch.zeros(slots, dtype=torch.uint8)
        mean, basis, steps, fields = self._tables()
        ops.encode(
            self.k_cache, self.v_cache, torch.arange(slots), mean, basis, steps, fields,
            self.codes, self.norms, self.valid,
        )  # fmt: skip

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.tables["mean"], self.tables["basis"], self.tables["steps"], self.tables["fields"]

    @functools.cache  # noqa: B019
    def side(self, selector: str) -> tuple[torch.Tensor | None, ...]:
        """The op's seven side-data arguments of a selector.

        ``quest`` and ``sign`` weigh their scores by a line fitted to this population's queries and keys, as a server
        does. ``hash`` has random nets: what its side data are worth depends on weights that only a model has.
        """
        if selector == "oracle":
            return (None,) * 7
        if selector == "sketch":
            return self.codes, self.norms, self.valid, *self._tables()
        slots = torch.arange(self.heads * self.context)
        norms = torch.zeros(slots.numel(), 1, 1, dtype=torch.uint8)
        valid = torch.zeros(slots.numel(), dtype=torch.uint8)
        if selector == "quest":
            fitted = self._fit(lambda layer, head, q, k, mean: pages.sample_features(q, k, mean, 1.0))
            bounds = torch.zeros(pages.num_pages(slots.numel()), 1, 2, HEAD_DIM)
            ops.encode_pages(self.k_cache, self.v_cache, slots, bounds, norms, valid)
            return bounds, norms, valid, fitted.mean[0], None, fitted.line[0], None
        angular = selector == "sign"
        nets, widths = signature.random_nets(0 if angular else 1, HEAD_DIM, SIGNATURE_BITS, 1)
        sizes = widths.tolist()
        fitted = self._fit(
            lambda layer, head, q, k, mean: signature.sample_features(
                q, k, mean, nets, nets, sizes, sizes, angular, 1.0
            )
        )
        codes = torch.zeros(slots.numel(), 1, SIGNATURE_BITS // signature.WORD_BITS, dtype=torch.int32)
        ops.encode_signature(self.k_cache, slots, fitted.mean[0], nets, widths, codes, norms, valid, angular)
        return codes, norms, valid, fitted.mean[0], nets, fitted.line[0], widths

    def _fit(self, features: line.Features) -> line.LineTables:
        moments = Moments.zeros(1, 1, HEAD_DIM, "cpu")
        moments.add(0, self.q, self.k_cache)
        return line.solve(moments, self.q[None], self.k_cache[None, :CALIBRATION_KEYS], 1.0, features)

    def _solve(self) -> None:
        rows = (self.heads, self.context)
        values = self.v_cache.view(*rows, HEAD_DIM).double()
        self.logits = torch.einsum("hnd,hd->hn", self.k_cache.view(*rows, HEAD_DIM).double(), self.q[:, 0].double())
        position, length = torch.arange(self.context), self.seq_lens[:, None]
        self.logits[position >= length] = -math.inf
        self.weights = torch.softmax(self.logits, -1)
        self.out = torch.einsum("hn,hnd->hd", self.weights, values)
        self.inner = (position >= DEFAULTS.sink) & (position < length - DEFAULTS.window)
        self.fixed_share = (self.weights * ~self.inner).sum(-1)

    @property
    def needle_share(self) -> float:
        """Share of the mass that the heaviest token of the range has, mean over heads."""
        return float((self.weights * self.inner).amax(-1).mean())

    def run(
        self, sampler: str, selector: str, target: str, row: torch.Tensor, seed: int, pilot: float, cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and stats of one step of every head: ``[heads, HEAD_DIM]`` and ``[heads, len(STATS)]``."""
        out = torch.full_like(self.q, float("nan"))
        stats = torch.full((self.heads, 1, len(ops.STATS)), float("nan"))
        edges, offsets = torch.tensor([0.1]), [0, 1, 6, 10, 13, 16, 18]
        codes, norms, valid, mean, basis, steps, fields = self.side(selector)
        ops.decode(
            self.q, self.k_cache, self.v_cache, self.slots, self.seq_lens,
            codes, norms, valid, mean, basis, steps, fields, row,
            torch.tensor([2**31 - 1], dtype=torch.int32), edges, edges, edges, out, stats,
            torch.zeros(21, dtype=torch.float64), offsets, sm_scale=1.0, layer_id=0, seed=seed, sampler=sampler,
            target=target, selector=selector, sink=DEFAULTS.sink, window=DEFAULTS.window, dense_below=0,
            **DEFAULTS.top_k_arguments, pilot=pilot, pilot_min=DEFAULTS.pilot_min, cap=cap,
            floor=Settings.default_floor(selector), audit_rate=0.0,
        )  # fmt: skip
        return out[:, 0].double(), stats[:, 0].double()

    def denominators(self, stats: torch.Tensor) -> torch.Tensor:
        """``D^ / D`` of every head: the exact share of the fixed set over the one that the op states."""
        return self.fixed_share / (1 - stats[:, ops.STATS.index("residual_mass")])

    def errors(self, target: str, out: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
        """Relative error of every head in the target's own norm."""
        if target == "denominator":
            return (self.denominators(stats) - 1).abs()
        found = out * self.denominators(stats)[:, None] if target == "numerator" else out
        return (found - self.out).norm(dim=-1) / self.out.norm(dim=-1)

    @functools.cache  # noqa: B019
    def pilot_spread(self, sampler: str, selector: str, target: str) -> float:
        """Spread of the pilot's variance estimate over that of normal summands, exact, median over heads.

        Relative variance of the estimate: ``(m4 / m2^2 - 1) / b0`` (``uniform``) or ``sum (1 - pi)^3 / pi^3 d^4 / V^2``
        (``proportional``), over the ``2 / (b0 - 1)`` that ``student`` presumes; its root. Target ``sdpa`` takes the
        larger of its two sums.
        """
        if target == "sdpa":
            return max(self.pilot_spread(sampler, selector, part) for part in ("numerator", "denominator"))
        spreads = []
        for head in range(self.heads):
            inner = self.inner[head]
            slots = self.slots[head][inner].long()
            values = self.v_cache[slots, 0].double()
            total = int(inner.sum())
            share = self._shares(head, slots, selector, with_norm=target != "denominator" and sampler == "proportional")
            gap = {"denominator": torch.ones(total, 1).double(), "numerator": values, "output": values - self.out[head]}
            x = self.weights[head][inner][:, None] * gap[target]
            first = max(DEFAULTS.pilot_min, math.ceil(DEFAULTS.pilot * total))
            normal = math.sqrt(2 / (first - 1))
            if sampler == "uniform":
                top_k = uniform.top_k_size(
                    DEFAULTS.top_k_arguments["top_k_count"], DEFAULTS.top_k_arguments["top_k_share"], total
                )
                rest = share.sort(descending=True, stable=True).indices[top_k:]
                square = (x[rest] - x[rest].mean(0)).square().sum(-1)
                second, fourth = float(square.mean()), float(square.square().mean())
                spreads.append(math.sqrt(max(0.0, fourth / second**2 - 1) / first) / normal if second > 1e-30 else 0.0)
                continue
            usable = torch.ones(total, dtype=torch.bool)
            score = scores.floored(share[None], usable, Settings.default_floor(selector))[0]
            pi = (first / float(score.sum()) * score).clamp(max=1)
            terms = (1 - pi) / pi * x.square().sum(-1)
            spreads.append(float((terms.square() * (1 - pi) / pi).sum().sqrt() / terms.sum()) / normal)
        return float(torch.tensor(spreads).median())

    def _shares(self, head: int, slots: torch.Tensor, selector: str, with_norm: bool) -> torch.Tensor:
        """Scores of one head's range as the op makes them, float64 ``[N]``."""
        q = self.q[head].double()
        outside = ~self.inner[head] & (torch.arange(self.context) < self.seq_lens[head])
        estimated = self.logits[head][self.inner[head]][None]
        variance, norm = torch.zeros_like(estimated), self.v_cache[slots, 0].double().norm(dim=-1)
        if selector != "oracle":
            codes, norms, _, mean, basis, steps, fields = self.side(selector)
            assert codes is not None and norms is not None and mean is not None and steps is not None
            norm = sketch.norm_of(norms[slots, 0, -1])
            if selector == "quest":
                estimated = quest.logits(q, codes[slots // pages.PAGE, 0], mean[0], steps[0], 1.0)
            else:
                assert basis is not None and fields is not None
                read = (codes[slots, 0], norms[slots, 0], mean[0])
                if selector == "sketch":
                    estimated, variance = sketch.logits(q, *read, basis[0], steps[0], fields[0], 1.0)
                else:
                    angular = selector == "sign"
                    estimated = signatures.logits(q, *read, basis, steps[0], fields, angular, 1.0)
        norm = norm if with_norm else torch.ones_like(norm)
        usable = torch.ones(slots.numel(), dtype=torch.bool)
        return scores.shares(estimated, variance, self.logits[head][outside][None], norm, usable)[0][0]


@functools.lru_cache(maxsize=2)
def population(name: str, seed: int = 0, value_dims: int = VALUE_DIMS) -> Population:
    """A population, made once."""
    return Population(name, seed, value_dims)


@functools.cache
def served_dimensions(selector: str, name: str, seed: int, value_dims: int) -> float:
    """What ``f8`` is told of a population: calibration has seen other data of its kind, and `oracle` learns nothing."""
    if selector == "oracle":
        return dimensions.MOST
    return dimensions.effective(Population(name, seed + 1, value_dims).v_cache)


@dataclass(frozen=True)
class Cell:
    """One entry of the table of violations."""

    population: str
    selector: str
    sampler: str
    target: str
    bound: str
    epsilon: float
    value_dims: int = VALUE_DIMS


@dataclass(frozen=True)
class Result:
    """What a cell's trials showed.

    Attributes
    ----------
    cell : Cell
        The cell.
    trials, violations : int
        Head-steps, and those whose error exceeded epsilon.
    silent : int
        Violations of head-steps that were reported as certified.
    density, mean_error : float
        Means over head-steps.
    pilot_spread : float
        `Population.pilot_spread`.
    """

    cell: Cell
    trials: int
    violations: int
    silent: int
    density: float
    mean_error: float
    pilot_spread: float

    @property
    def rate(self) -> float:
        """Share of trials that are violations."""
        return self.violations / self.trials

    @property
    def certified_rate(self) -> float:
        """Share of trials that are violations and were reported as certified."""
        return self.silent / self.trials

    @property
    def exceeds(self) -> bool:
        """Whether a true rate of delta is rejected at `LEVEL`."""
        return self.violations > most_violations(self.trials)


def most_violations(trials: int, delta: float = DELTA) -> int:
    """Largest count that a true rate of delta reaches but with probability `LEVEL`."""
    return int(binom.ppf(1 - LEVEL, trials, delta))


def detectable_rate(trials: int, delta: float = DELTA) -> float:
    """Least true rate, to .001, that the test catches with probability `POWER` or more."""
    most = most_violations(trials, delta)
    return next(r / 1000 for r in range(1000) if r / 1000 > delta and binom.sf(most, trials, r / 1000) >= POWER)


def cells(populations: tuple[str, ...] = POPULATIONS, epsilons: tuple[float, ...] = EPSILONS) -> Iterator[Cell]:
    """Every cell, population by population; last, values that vary in one dimension, which ``f8`` must learn."""
    for name in populations:
        for selector in SELECTORS:
            for sampler in ops.SAMPLERS:
                for target in ops.TARGETS:
                    for bound in BOUNDS_OF_TARGET[target]:
                        for epsilon in epsilons:
                            yield Cell(name, selector, sampler, target, bound, epsilon)
    for sampler in ops.SAMPLERS:
        for bound in BOUNDS_OF_TARGET["output"]:
            for epsilon in epsilons:
                yield Cell("gaussian", "sketch", sampler, "output", bound, epsilon, value_dims=1)


def measure(cell: Cell, calls: int, seed: int = 0, dims: float | None = None) -> Result:
    """Run a cell.

    Parameters
    ----------
    cell : Cell
        The cell.
    calls : int
        Calls of the op; each gives `HEADS` independent trials.
    seed : int
        Of the data and of the samples.
    dims : float, optional
        Effective dimensions that ``f8`` is told; default `served_dimensions`.

    Returns
    -------
    Result
    """
    data = population(cell.population, seed, cell.value_dims)
    if dims is None:
        dims = served_dimensions(cell.selector, cell.population, seed, cell.value_dims)
    row = torch.tensor(params.pack(cell.epsilon, DELTA, cell.bound, dims))
    above = silent = 0
    density = mean_error = 0.0
    for call in range(calls):
        out, stats = data.run(cell.sampler, cell.selector, cell.target, row, seed * 100_000 + call, DEFAULTS.pilot, 1.0)
        errors = data.errors(cell.target, out, stats)
        # A NaN violates.
        violated = ~(errors <= cell.epsilon)
        above += int(violated.sum())
        silent += int((violated & (stats[:, ops.STATS.index("outcome")] == CERTIFIED)).sum())
        density += float(stats[:, ops.STATS.index("density")].mean()) / calls
        mean_error += float(errors.mean()) / calls
    spread = data.pilot_spread(cell.sampler, cell.selector, cell.target)
    return Result(cell, calls * data.heads, above, silent, density, mean_error, spread)


def explain(result: Result, others: dict[Cell, Result]) -> str | None:
    """Why a cell may exceed delta, by a rule that was fixed before the run; None if nothing explains it.

    1. ``bernstein`` assumes nothing about the population: no violation of it is explained.
    2. *Needle*: the codes rank a token with a quarter of the mass among the many, so no sample knows of it.
    3. *Estimated sigma*: ``clt`` takes the estimated variance for the true one; explained if ``student``, which does
       not, holds in the same cell.

    The rest is about sampler ``uniform`` alone, and about rates of at most `MOST_DELTAS` times delta. Of
    ``proportional``, the product's own, nothing else is explained.

    4. *Tail*: the pilot's variance estimate spreads more than `WIDEST_SPREAD` times as widely as with normal summands,
       which ``clt``, ``student`` and ``f8`` presume (`Population.pilot_spread`).
    5. *No slack*: ``f8`` keeps 1.39 standard errors, a quantile measured for ``proportional``, where ``student`` keeps
       1.96; explained if ``student`` holds in the same cell.

    Parameters
    ----------
    result : Result
        A cell that exceeds delta.
    others : dict of Cell to Result
        All results.
    """
    cell = result.cell
    if cell.bound == "bernstein":
        return None
    if (cell.population, cell.selector) == ("needle", "sketch"):
        return "needle"
    student = others.get(replace(cell, bound="student"))
    student_holds = student is not None and not student.exceeds
    if cell.bound == "clt" and student_holds:
        return "estimated sigma"
    if cell.sampler == "uniform" and result.rate <= MOST_DELTAS * DELTA:
        if result.pilot_spread > WIDEST_SPREAD:
            return "tail"
        if cell.bound == "f8" and student_holds:
            return "no slack"
    return None


@dataclass(frozen=True)
class Bias:
    """Mean relative deviation of a sum at a fixed sample size.

    Attributes
    ----------
    population, selector, sampler, total : str
        What was sampled, and ``D`` or ``Nv`` (its direction with the largest deviation).
    trials : int
        Head-steps.
    mean, error : float
        Mean relative deviation from the exact value, and its standard error.
    """

    population: str
    selector: str
    sampler: str
    total: str
    trials: int
    mean: float
    error: float

    @property
    def biased(self) -> bool:
        """Whether the mean is further from 0 than `MOST_ERRORS` standard errors."""
        return not abs(self.mean) <= MOST_ERRORS * self.error + ROUNDING


def unbiasedness(name: str, selector: str, sampler: str, calls: int, seed: int = 0) -> list[Bias]:
    """Deviation of D and Nv at a sample of a twentieth of the range.

    The cap ends the sample at a size that does not depend on it, so the sums are unbiased; where the stopping rule
    chooses the size they need not be, and the violation rates are what counts. Target ``numerator`` serves both sums as
    they are, while ``output`` shrinks what a cap leaves to coarse scores (`vattn_kernels.reference.estimate.shrunk`).

    Parameters
    ----------
    name, selector, sampler : str
        Population, selector and sampler.
    calls : int
        Calls of the op, `HEADS` trials each.
    seed : int
        Of the data and of the samples.

    Returns
    -------
    list of Bias
        For ``D`` and ``Nv``.
    """
    data = population(name, seed)
    row = torch.tensor(params.pack(0.001, DELTA, "student"))
    scalars, vectors = [], []
    for call in range(calls):
        out, stats = data.run(sampler, selector, "numerator", row, seed * 100_000 + 50_000 + call, 0.05, 0.05)
        assert (stats[:, ops.STATS.index("outcome")] == CAPPED).all()
        ratio = data.denominators(stats)
        scalars.append(ratio - 1)
        vectors.append((out * ratio[:, None] - data.out) / data.out.norm(dim=-1, keepdim=True))
    d, nv = torch.cat(scalars), torch.cat(vectors)
    trials = d.numel()
    mean, error = nv.mean(0), nv.std(0) / trials**0.5
    worst = int((mean.abs() / error.clamp(min=1e-12)).argmax())
    rows = [("D", float(d.mean()), float(d.std()) / trials**0.5), ("Nv", float(mean[worst]), float(error[worst]))]
    return [Bias(name, selector, sampler, total, trials, m, e) for total, m, e in rows]
