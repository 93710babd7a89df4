"""Poisson sampling in proportion to the scores, in rounds (``algorithm.md``, "Two samplers"; ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vattn_kernels.reference import budget
from vattn_kernels.reference.estimate import Estimate, Head, estimate

ROUNDS = 4
LEAST_GROWTH = 1.05


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
    """Pilot, then scales solved from everything read, until every head's half-width is at most epsilon.

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
    target : {"output", "denominator"}
        What the bound is about.
    pilot, pilot_min, cap : float, int, float
        Settings.
    """
    epsilon, total = float(row[0]), scores.numel()
    finite = scores < 1e29
    scale = max(pilot_min, math.ceil(pilot * total)) / float(scores[finite].sum().clamp(min=1e-30))
    scale, capped = limit(scores, scale, cap)
    for round_ in range(ROUNDS):
        inside = (rank < scale).nonzero()[:, 0]
        share = scores[inside]
        # Once everything was read nothing is left to estimate.
        whole = inside.numel() == total
        weight = torch.ones_like(share) if whole else 1 / (scale * share).clamp(max=1)
        estimates = [estimate(head, inside + low, weight, target) for head in heads]
        half_widths, wanted = [], scale
        for e in estimates:
            deviation2 = e.deviation2 / e.unit**2
            factor = budget.quantile(row, budget.degrees_of_freedom(deviation2, share, scale))
            spread = 0.0 if whole else max(0.0, budget.variance(deviation2, share, scale, scale))
            half_widths.append(factor * math.sqrt(spread))
            aim = epsilon / (budget.FIRST_ROUND_QUANTILE if round_ == 0 else factor)
            norm = max(float(e.out.norm()), 1e-30) if target == "output" else 1.0
            guard = budget.GUARD_SHARE / (epsilon * norm)
            wanted = max(wanted, budget.least_scale(deviation2, share, scale, aim), guard)
        certified = round_ > 0 and all(h <= epsilon for h in half_widths)
        if whole or certified or round_ == ROUNDS - 1:
            break
        if round_ > 0:
            wanted = max(wanted, LEAST_GROWTH * scale)
        limited, cut = limit(scores, wanted, cap)
        capped = capped or cut
        if capped and limited <= scale:
            break
        scale = max(scale, limited)
    return Sample(inside + low, estimates, half_widths, [capped] * len(heads), inside.numel())


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
