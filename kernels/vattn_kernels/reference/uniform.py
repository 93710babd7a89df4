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
    """Pilot of the first ``b0`` images of a keyed permutation, then the first ``b`` (nested).

    The population value of a top-k member is 0 (ours), so that the pilot's moments are those of the rest. Bound
    ``bernstein`` looks at sizes of a fixed grid until it holds (`vattn_kernels.reference.bernstein`).

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
    members = torch.sort(shares, descending=True, stable=True).indices[:top_k]
    is_member = torch.zeros(total, dtype=torch.bool)
    is_member[members] = True
    order = rng.permutation(total, key)
    first = min(total, max(pilot_min, math.ceil(pilot * total)))
    most = max(first, math.floor(cap * total))
    split = target == "sdpa"
    log = float(row[layout.SPLIT_LOG if split else layout.LOG])
    looks = sorted({*(min(total, math.ceil(b)) for b in bernstein.grid(first, total)), most})
    size, cut = first, [False] * len(heads)
    rounds = ROUNDS if log else 2
    for round_ in range(rounds):
        drawn = order[:size]
        drawn = drawn[~is_member[drawn]]
        read = torch.cat([members, drawn])
        weight = torch.cat([torch.ones(top_k), torch.full((drawn.numel(),), total / size)]).double()
        estimates = [estimate(head, read + low, weight, target, log > 0) for head in heads]
        half_widths, wanted = [], size
        z = budget.quantile(row, size - 1, split)
        for index, (head, e) in enumerate(zip(heads, estimates, strict=True)):
            sigmas = {name: _deviation(part, top_k, size) for name, part in e.parts.items()}
            if log:
                open_ = ~is_member
                half_widths.append(_provable(head, e, target, sigmas, open_, log, size, total))
                if half_widths[-1] > epsilon and round_ < rounds - 1:
                    later = [b for b in looks if b > size] or [total]
                    enough = [b for b in later if _provable(head, e, target, sigmas, open_, log, b, total) <= epsilon]
                    needed = (enough or [total])[0]
                    cut[index] = needed > most
                    wanted = max(wanted, min(needed, most))
                continue
            sigma = FACTOR[target] * sum(sigmas.values())
            half_widths.append(z * total * sigma * math.sqrt(max(0.0, 1 / size - 1 / total)))
            if round_ == 0:
                needed = max(first, math.ceil(budget.sample_size(sigma, epsilon, z, total)))
                cut[index] = needed > most
                wanted = max(wanted, min(needed, most))
        if wanted == size:
            break
        size = wanted
    return Sample(read + low, estimates, half_widths, cut, size)


def _deviation(part: Part, top_k: int, size: int) -> float:
    """Sample deviation ``sqrt(Tr Cov(x))`` over the unit; a top-k member that was drawn counts as 0."""
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
    total: int,
) -> float:
    """Half-width of bound ``bernstein`` of a sample of ``size``, from the deviations of the sample at hand."""
    reach = bernstein.reaches(head, open_, torch.zeros(total).double(), e.maximum, float(e.out.norm()))
    widths = {}
    for name, part in e.parts.items():
        # A weight and its mean lie in [0, reach]; a vector and its mean are up to two reaches apart.
        diameter = reach[name] * (1 if name == "denominator" and target != "output" else 2)
        widths[name] = bernstein.uniform(sigmas[name], diameter / part.unit, log, size, total)
    return bernstein.combine(target, widths)
