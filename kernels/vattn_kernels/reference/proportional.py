"""Poisson sampling in proportion to the scores, in rounds (``algorithm.md``, "Two samplers"; ours).

Token i is read with probability ``pi_i = min(1, max over heads h of c_h s_hi)``: every head has a score and a scale of
its own, and uses all that the group reads with weight ``1 / pi_i``. The scales only grow, so a later sample contains an
earlier one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vattn_kernels import params as layout
from vattn_kernels.reference import bernstein, budget
from vattn_kernels.reference.estimate import FACTOR, Estimate, Head, estimate
from vattn_kernels.reference.scores import INFINITE, MAX_EXPONENT, intensity

# Nearly every step is certified in two or three rounds. One that is not reads on, in the end everything.
ROUNDS = 48
PATIENCE = 8
LEAST_GROWTH, IMPATIENT_GROWTH = 1.05, 2.0
EVERYTHING = 2e30
# Times that a group's scales are solved in turn.
SWEEPS = 2
# Of what a cap leaves to a selector that ranks better than it weighs, the share that goes to its best scores.
RANKED_SHARE = 2 / 3
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
    weight : torch.Tensor
        float64 ``[m]``, inverse probabilities of ``read``.
    """

    read: torch.Tensor
    estimates: list[Estimate]
    half_widths: list[float]
    capped: list[bool]
    budget: int
    weight: torch.Tensor


def sample(
    heads: list[Head],
    scores: torch.Tensor,
    draws: torch.Tensor,
    low: int,
    row: torch.Tensor,
    target: str,
    begin: float,
    cap: float,
    ranks: bool = False,
) -> Sample:
    """Pilot, then scales solved from everything read, until every head's half-width is at most epsilon or all is read.

    Bound ``bernstein`` takes its scale from a grid that the sample does not influence
    (`vattn_kernels.reference.bernstein`).

    Parameters
    ----------
    heads : list of Head
        The group.
    scores : torch.Tensor
        float64 ``[R, N]`` from `vattn_kernels.reference.scores.floored`: one row a head, each with a scale of its own,
        or one for all of them; for bound ``bernstein`` one.
    draws : torch.Tensor
        ``u_i``, float64 ``[N]``.
    low : int
        Position of the first token of the range.
    row : torch.Tensor
        The layer's parameters.
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about.
    begin : float
        Scale of the pilot, the same for every row.
    cap : float
        Largest share of the range that may be read.
    ranks : bool
        Whether a cap that cuts gives `RANKED_SHARE` of what it leaves to the best scores; not with ``bernstein``, whose
        looks rest on the scores.
    """
    epsilon, total = float(row[0]), draws.numel()
    split = target == "sdpa"
    log = float(row[layout.SPLIT_LOG if split else layout.LOG])
    nothing = torch.zeros(scores.shape[0]).double()
    scales, capped = limit(scores, nothing, nothing + begin, cap)
    looks = bernstein.grid(float(scales[0]), (1 + 1e-5) / min(float(scores[0].min()), INFINITE))
    for round_ in range(ROUNDS):
        likely = intensity(scores, scales)
        inside = (draws < likely).nonzero()[:, 0]
        # Once everything was read nothing is left to estimate.
        whole = inside.numel() == total
        weight = torch.ones(total).double() if whole else 1 / likely[inside].clamp(max=1)
        estimates = [estimate(head, inside + low, weight, target, log > 0) for head in heads]
        half_widths, wants, wanted = [], [], scales.clone()
        for head, e in zip(heads, estimates, strict=True):
            if log:
                scale = float(scales[0])
                half_widths.append(0.0 if whole else _provable(head, e, target, scores[0], inside, weight, scale, log))
                if half_widths[-1] > epsilon:
                    later = [c for c in looks if c > scale * LEAST_STEP] or [scale]
                    enough = (
                        c for c in later if _provable(head, e, target, scores[0], inside, weight, c, log) <= epsilon
                    )
                    wanted[0] = max(float(wanted[0]), next(enough, later[-1]))
                continue
            deviations2 = [part.relative2 for part in e.parts.values()]
            factors = [budget.quantile(row, budget.degrees_of_freedom(d, weight), split) for d in deviations2]
            spreads = [max(0.0, budget.variance(d, weight, 1 / weight)) for d in deviations2]
            half_widths.append(FACTOR[target] * sum(f * math.sqrt(s) for f, s in zip(factors, spreads, strict=True)))
            used = [budget.FIRST_ROUND_QUANTILE] * len(factors) if round_ == 0 else factors
            norm = 1.0 if target == "denominator" else max(float(e.out.norm()), 1e-30)
            # Shares are relative to the scores' own mass, which a few tokens that they overrate may multiply.
            overrated = math.exp(min(max(head.estimated_mass - e.log_mass, 0.0), MAX_EXPONENT))
            wants.append(
                Want(
                    [d * (FACTOR[target] * f) ** 2 for d, f in zip(deviations2, used, strict=True)],
                    overrated * budget.GUARD_SHARE * FACTOR[target] / (epsilon * norm),
                    round_ == 0 or half_widths[-1] > epsilon,
                )
            )
        certified = (round_ > 0 or log > 0) and all(h <= epsilon for h in half_widths)
        if whole or certified or round_ == ROUNDS - 1:
            break
        if not log:
            growth = 1.0 if round_ == 0 else LEAST_GROWTH if round_ < PATIENCE else IMPATIENT_GROWTH
            wanted = solve(wants, weight, scores[:, inside], scales, growth, epsilon)
        if round_ == ROUNDS - 2:
            wanted = torch.full_like(scales, EVERYTHING)
        within, cut = limit(scores, scales, wanted, cap)
        if capped and cut:
            break
        if cut and ranks and not log:
            scores = ranked(scores, scales, cap)
            within, _ = limit(scores, scales, wanted, cap)
        scales, capped = within, capped or cut
    return Sample(inside + low, estimates, half_widths, [capped] * len(heads), inside.numel(), weight)


@dataclass
class Want:
    """What a head asks of its scale.

    Attributes
    ----------
    deviations2 : list of torch.Tensor
        ``d_i^2`` of every part, times its squared quantile.
    guard : float
        Least scale: a token whose estimated share of the output exceeds ``eps / GUARD_SHARE`` is read for certain.
    grows : bool
        Whether the head is not certified yet; others leave their scale.
    """

    deviations2: list[torch.Tensor]
    guard: float
    grows: bool


def solve(
    wants: list[Want], weight: torch.Tensor, share: torch.Tensor, scales: torch.Tensor, growth: float, epsilon: float
) -> torch.Tensor:
    """Scales at which every head's half-width is epsilon by what was read, each the least beside the others.

    Each head reads what the others read too, so the scales are solved in turn, a few times over.

    Parameters
    ----------
    wants : list of Want
        One a head.
    weight : torch.Tensor
        Inverse inclusion probabilities of what was read, float64 ``[m]``.
    share : torch.Tensor
        Scores of what was read, float64 ``[R, m]``.
    scales : torch.Tensor
        float64 ``[R]``, at which it was read.
    growth : float
        Least growth of a scale that grows.
    epsilon : float
        Bound.

    Returns
    -------
    torch.Tensor
        float64 ``[R]``, at least ``scales``.
    """
    rows = scales.numel()
    of_row = [wants] if rows == 1 else [[want] for want in wants]
    of_row = [[want for want in row if want.grows] for row in of_row]
    least = [
        max([float(c), *(max(float(c) * growth, min(want.guard, budget.MOST_SCALE)) for want in row)])
        for c, row in zip(scales, of_row, strict=True)
    ]
    solved = torch.tensor(least, dtype=torch.float64)
    for _ in range(1 if rows == 1 else SWEEPS):
        for r, row in enumerate(of_row):
            apart = solved.clone()
            apart[r] = 0
            others = intensity(share, apart)
            found = (budget.least_scale(want.deviations2, weight, share[r], others, least[r], epsilon) for want in row)
            solved[r] = max([least[r], *found])
    return solved


def _provable(
    head: Head,
    e: Estimate,
    target: str,
    scores: torch.Tensor,
    inside: torch.Tensor,
    weight: torch.Tensor,
    at: float,
    log: float,
) -> float:
    """Half-width of bound ``bernstein`` at scale ``at``, from what was read."""
    open_ = at * scores < 1
    reach = bernstein.reaches(head, open_, -(at * scores).log(), e.maximum, float(e.out.norm()))
    widths = {}
    for name, part in e.parts.items():
        variance = budget.variance(part.relative2, weight, (at * scores[inside]).clamp(max=1))
        widths[name] = bernstein.poisson(math.sqrt(max(0.0, variance)), reach[name] / part.unit, log)
    return bernstein.combine(target, widths)


def limit(scores: torch.Tensor, scales: torch.Tensor, wanted: torch.Tensor, cap: float) -> tuple[torch.Tensor, bool]:
    """Scales on the way from ``scales`` to ``wanted`` whose expected reads stay within the cap, and whether it cut."""
    allowed = cap * scores.shape[1]

    def at(part: float) -> torch.Tensor:
        return scales + part * (wanted - scales)

    def reads(part: float) -> float:
        return float(intensity(scores, at(part)).clamp(max=1).sum())

    if cap >= 1 or reads(1.0) <= allowed:
        return wanted, False
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reads(middle) <= allowed else (low, middle)
    return at(low), True


def ranked(scores: torch.Tensor, scales: torch.Tensor, cap: float) -> torch.Tensor:
    """Scores of which the best are to be read for certain: `RANKED_SHARE` of the reads that the cap leaves.

    A rank needs less of a score than a probability does, and what is read for certain adds no noise.

    Parameters
    ----------
    scores : torch.Tensor
        float64 ``[R, N]``.
    scales : torch.Tensor
        float64 ``[R]``, at which was read so far.
    cap : float
        Largest share of the range that may be read.

    Returns
    -------
    torch.Tensor
        float64 ``[R, N]``, `INFINITE` where a token is among the best by its largest score.
    """
    room = cap * scores.shape[1] - float(intensity(scores, scales).clamp(max=1).sum())
    order = torch.sort(scores.amax(0), descending=True, stable=True).indices
    best = order[: max(0, int(RANKED_SHARE * room))]
    return scores.index_fill(1, best, INFINITE)
