"""The paper's sampler: top-k read for certain, and a uniform sample without replacement of the rest."""

from __future__ import annotations

import math

import torch

from vattn_kernels import params as layout
from vattn_kernels.reference import bernstein, budget, rng
from vattn_kernels.reference.estimate import FACTOR, Estimate, Head, Part, estimate
from vattn_kernels.reference.proportional import ROUNDS, Sample


def top_k_size(count: int, share: float, total: int) -> int:
    """Tokens of the top-k: a count, or with ``count`` -1 a share of the range."""
    return min(total, count if count >= 0 else math.ceil(share * total))


def sample(
    heads: list[Head],
    shares: torch.Tensor,
    top_k: int,
    low: int,
    key: int,
    row: torch.Tensor,
    target: str,
    pilot: float,
    pilot_min: int,
    cap: float,
) -> Sample:
    """Pilot of the first ``b0`` images of a keyed permutation that are no top-k members, then the first ``b`` (nested).

    The population are the ``M = N - top_k`` tokens of the range outside the top-k (ours): members are skipped while the
    permutation of the range is walked, which leaves a uniform sample without replacement of the rest. Its weights are
    ``M / b``, its moments those of the rest, and the finite-population correction has M, so a sample of everything is
    exact and so is one of equal weights. Pilot and cap are shares of the range, as with ``proportional``:
    ``b0 = max(pilot_min, ceil(pilot N))`` and at most ``max(b0, floor(cap N))`` tokens, none of them beyond M. A top-k
    that covers the range leaves nothing to sample: everything is read, half-width 0.

    Bound ``bernstein`` looks at sizes of a fixed grid from ``b0`` to M until it holds
    (`vattn_kernels.reference.bernstein`).

    Parameters
    ----------
    heads : list of Head
        The group.
    shares : torch.Tensor
        float64 ``[N]`` scores.
    top_k : int
        Tokens read for certain.
    low, key, row, target, pilot, pilot_min, cap
        As in `vattn_kernels.reference.proportional.sample`.
    """
    epsilon, total = float(row[0]), shares.numel()
    # Tokens with equal codes tie, and the first of them wins; float64 would tell them apart by rounding.
    members = torch.sort(shares.float(), descending=True, stable=True).indices[:top_k]
    open_ = torch.ones(total, dtype=torch.bool)
    open_[members] = False
    order = rng.permutation(total, key)
    order = order[open_[order]]
    population = order.numel()
    first = min(population, max(pilot_min, math.ceil(pilot * total)))
    most = min(population, max(first, math.floor(cap * total)))
    split = target == "sdpa"
    log = float(row[layout.SPLIT_LOG if split else layout.LOG])
    grid = bernstein.grid(first, population) if population else []
    looks = sorted({*(min(population, math.ceil(b)) for b in grid), most})
    size, cut = first, [False] * len(heads)
    rounds = ROUNDS if log else 2
    for round_ in range(rounds):
        read = torch.cat([members, order[:size]])
        weight = torch.cat([torch.ones(top_k), torch.full((size,), population / max(1, size))]).double()
        estimates = [estimate(head, read + low, weight, target, log > 0) for head in heads]
        if size == population:
            half_widths = [0.0] * len(heads)
            break
        half_widths, wanted = [], size
        z = budget.quantile(row, size - 1, split)
        for index, (head, e) in enumerate(zip(heads, estimates, strict=True)):
            sigmas = {name: _deviation(part, top_k, size) for name, part in e.parts.items()}
            if log:
                half_widths.append(_provable(head, e, target, sigmas, open_, log, size, population))
                if half_widths[-1] > epsilon and round_ < rounds - 1:
                    later = [b for b in looks if b > size]
                    enough = (
                        b for b in later if _provable(head, e, target, sigmas, open_, log, b, population) <= epsilon
                    )
                    needed = next(enough, population)
                    cut[index] = needed > most
                    wanted = max(wanted, min(needed, most))
                continue
            sigma = FACTOR[target] * sum(sigmas.values())
            half_widths.append(z * population * sigma * math.sqrt(1 / size - 1 / population))
            if round_ == 0:
                needed = max(first, math.ceil(budget.sample_size(sigma, epsilon, z, population)))
                cut[index] = needed > most
                wanted = max(wanted, min(needed, most))
        if wanted == size:
            break
        size = wanted
    return Sample(read + low, estimates, half_widths, cut, size, weight)


def _deviation(part: Part, top_k: int, size: int) -> float:
    """Sample deviation ``sqrt(Tr Cov(x))`` over the unit, of the ``size`` tokens behind the top-k."""
    vectors = part.vectors[top_k:] / part.unit
    squares = float(vectors.square().sum())
    return math.sqrt(max(0.0, (squares - float(vectors.sum(0).square().sum()) / size) / (size - 1)))


def _provable(
    head: Head,
    e: Estimate,
    target: str,
    sigmas: dict[str, float],
    open_: torch.Tensor,
    log: float,
    size: int,
    population: int,
) -> float:
    """Half-width of bound ``bernstein`` of a sample of ``size``, from the deviations of the sample at hand."""
    reach = bernstein.reaches(head, open_, torch.zeros(open_.numel()).double(), e.maximum, float(e.out.norm()))
    widths = {}
    for name, part in e.parts.items():
        # A weight and its mean lie in [0, reach]; a vector and its mean are up to two reaches apart.
        diameter = reach[name] * (1 if name == "denominator" and target != "output" else 2)
        widths[name] = bernstein.uniform(sigmas[name], diameter / part.unit, log, size, population)
    return bernstein.combine(target, widths)
