"""Poisson sampling in proportion to the scores, in rounds (``algorithm.md``, "Two samplers"; ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vattn_kernels import params as layout
from vattn_kernels.reference import bernstein, budget
from vattn_kernels.reference.estimate import FACTOR, Estimate, Head, estimate

# Nearly every step is certified in two or three rounds. One that is not reads on, in the end everything.
ROUNDS = 48
PATIENCE = 8
LEAST_GROWTH, IMPATIENT_GROWTH = 1.05, 2.0
EVERYTHING = 2e30
# Looks closer than this are the same look up to rounding.
LEAST_STEP = 1.0001


@dataclass
class Sample:
    """What a sampler read and what it supports.

    Attributes
    ----------
    read : torch.Tensor
        int64 ``[m]`` positions outside the fixed set.
    estimates : list of Estimate
        One a head.
    half_widths : list of float
        Relative, at confidence ``1 - delta``.
    capped : list of bool
        Whether the cap cut the head's budget.
    budget : int
        Tokens of the sample.
    """

    read: torch.Tensor
    estimates: list[Estimate]
    half_widths: list[float]
    capped: list[bool]
    budget: int


def sample(
    heads: list[Head],
    scores: torch.Tensor,
    rank: torch.Tensor,
    low: int,
    row: torch.Tensor,
    target: str,
    pilot: float,
    pilot_min: int,
    cap: float,
) -> Sample:
    """Pilot, then scales solved from everything read, until every head's half-width is at most epsilon or all is read.

    Bound ``bernstein`` takes its scales from a grid that the sample does not influence
    (`vattn_kernels.reference.bernstein`).

    Parameters
    ----------
    heads : list of Head
        The group.
    scores, rank : torch.Tensor
        float64 ``[N]`` from `vattn_kernels.reference.scores.ranks`.
    low : int
        Position of the first token of the range.
    row : torch.Tensor
        The layer's parameters.
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about.
    pilot, pilot_min, cap : float, int, float
        Settings.
    """
    epsilon, total = float(row[0]), scores.numel()
    split = target == "sdpa"
    log = float(row[layout.SPLIT_LOG if split else layout.LOG])
    finite = scores < 1e29
    scale = max(pilot_min, math.ceil(pilot * total)) / float(scores[finite].sum().clamp(min=1e-30))
    scale, capped = limit(scores, scale, cap)
    looks = bernstein.grid(scale, (1 + 1e-5) / float(scores[finite].min())) if log and bool(finite.any()) else [scale]
    for round_ in range(ROUNDS):
        inside = (rank < scale).nonzero()[:, 0]
        share = scores[inside]
        # Once everything was read nothing is left to estimate.
        whole = inside.numel() == total
        weight = torch.ones_like(share) if whole else 1 / (scale * share).clamp(max=1)
        estimates = [estimate(head, inside + low, weight, target, log > 0) for head in heads]
        half_widths, wanted = [], scale
        for head, e in zip(heads, estimates, strict=True):
            if log:
                half_widths.append(0.0 if whole else _provable(head, e, target, scores, share, scale, scale, log))
                if half_widths[-1] > epsilon:
                    later = [c for c in looks if c > scale * LEAST_STEP] or [scale]
                    enough = [c for c in later if _provable(head, e, target, scores, share, scale, c, log) <= epsilon]
                    wanted = max(wanted, (enough or later[-1:])[0])
                continue
            deviations2 = [part.relative2 for part in e.parts.values()]
            factors = [budget.quantile(row, budget.degrees_of_freedom(d, share, scale), split) for d in deviations2]
            spreads = [0.0 if whole else max(0.0, budget.variance(d, share, scale, scale)) for d in deviations2]
            width = FACTOR[target] * sum(f * math.sqrt(s) for f, s in zip(factors, spreads, strict=True))
            half_widths.append(width)
            used = [budget.FIRST_ROUND_QUANTILE] * len(factors) if round_ == 0 else factors
            scaled = [d * (FACTOR[target] * f) ** 2 for d, f in zip(deviations2, used, strict=True)]
            norm = 1.0 if target == "denominator" else max(float(e.out.norm()), 1e-30)
            guard = budget.GUARD_SHARE * FACTOR[target] / (epsilon * norm)
            wanted = max(wanted, budget.least_scale(scaled, share, scale, epsilon), guard)
        certified = (round_ > 0 or log > 0) and all(h <= epsilon for h in half_widths)
        if whole or certified or round_ == ROUNDS - 1:
            break
        if round_ > 0 and not log:
            wanted = max(wanted, scale * (LEAST_GROWTH if round_ < PATIENCE else IMPATIENT_GROWTH))
        if round_ == ROUNDS - 2:
            wanted = EVERYTHING
        limited, cut = limit(scores, wanted, cap)
        capped = capped or cut
        if capped and limited <= scale:
            break
        scale = max(scale, limited)
    return Sample(inside + low, estimates, half_widths, [capped] * len(heads), inside.numel())


def _provable(
    head: Head,
    e: Estimate,
    target: str,
    scores: torch.Tensor,
    share: torch.Tensor,
    read_at: float,
    at: float,
    log: float,
) -> float:
    """Half-width of bound ``bernstein`` at scale ``at``, from what was read at ``read_at``."""
    open_ = at * scores < 1
    reach = bernstein.reaches(head, open_, -(at * scores).log(), e.maximum, float(e.out.norm()))
    widths = {}
    for name, part in e.parts.items():
        spread = math.sqrt(max(0.0, budget.variance(part.relative2, share, read_at, at)))
        widths[name] = bernstein.poisson(spread, reach[name] / part.unit, log)
    return bernstein.combine(target, widths)


def limit(scores: torch.Tensor, scale: float, cap: float) -> tuple[float, bool]:
    """Scale at which the expected reads stay within the cap, and whether that cut it."""
    allowed = cap * scores.numel()

    def reads(c: float) -> float:
        return float((c * scores).clamp(max=1).sum())

    if cap >= 1 or reads(scale) <= allowed:
        return scale, False
    low, high = 0.0, scale
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reads(middle) <= allowed else (low, middle)
    return low, True
