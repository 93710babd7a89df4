"""Formulas of the bound: what a sample supports, and what it would take."""

from __future__ import annotations

import math

import torch

from vattn_kernels import params as layout

FIRST_ROUND_QUANTILE = 1.2
GUARD_SHARE = 12.0
MOST_SCALE = 1e29


def quantile(row: torch.Tensor, nu: float, split: bool = False) -> float:
    """Quantile of the bound at ``nu`` degrees of freedom, as the table of one layer gives it.

    Parameters
    ----------
    row : torch.Tensor
        ``[PARAMS_WIDTH]``, see `vattn_kernels.params`.
    nu : float
        Degrees of freedom; below 2 the value at 2 is taken.
    split : bool
        Whether the quantile stands at half of delta (target ``sdpa``).
    """
    table = layout.SPLIT_TABLE if split else layout.TABLE
    x = min(0.0 if math.isinf(nu) else layout.TABLE_STEPS_PER_UNIT / nu, layout.TABLE_POINTS - 1)
    j = min(int(x), layout.TABLE_POINTS - 2)
    low, high = float(row[table + j]), float(row[table + j + 1])
    return low + (x - j) * (high - low)


def variance(deviation2: torch.Tensor, weight: torch.Tensor, pi: torch.Tensor) -> float:
    """``V(pi) = sum over what was read of weight_i (1 - pi_i)/pi_i d_i^2``: Poisson sampling at probabilities ``pi``.

    Parameters
    ----------
    deviation2 : torch.Tensor
        ``d_i^2 = |x_i|^2`` of a part's vectors (`vattn_kernels.reference.estimate.Part`), float64 ``[m]``.
    weight : torch.Tensor
        Inverse probabilities at which the tokens were read, float64 ``[m]``.
    pi : torch.Tensor
        float64 ``[m]``.
    """
    return float((weight * (1 / pi - 1) * deviation2).sum())


def degrees_of_freedom(deviation2: torch.Tensor, weight: torch.Tensor) -> float:
    """``nu = 2 V^2 / Var(V)``, both from the sample (``algorithm.md``, quantile ``f8``)."""
    terms = weight * (weight - 1) * deviation2
    spread = float((terms.square() * (1 - 1 / weight)).sum())
    return math.inf if spread == 0 else 2 * float(terms.sum()) ** 2 / spread


def least_scale(
    deviations2: list[torch.Tensor],
    weight: torch.Tensor,
    share: torch.Tensor,
    others: torch.Tensor,
    least: float,
    aim: float,
) -> float:
    """Least ``c >= least`` with ``sum over parts of sqrt(V(pi(c))) <= aim``, by bisection; V falls in c.

    With two parts this is the paper's Lemma 4.2 at the best split of its Theorem 4.3: the budget
    ``max(c_N(eps1), c_D(eps2))`` under ``eps1 + eps2 <= aim`` is least where both are equal, hence at the least c whose
    two half-widths add up to aim.

    Parameters
    ----------
    deviations2 : list of torch.Tensor
        ``d_i^2`` of every part, float64 ``[m]``.
    weight : torch.Tensor
        As in `variance`.
    share, others : torch.Tensor
        Scores ``a_i``, and what other scales give: ``pi_i(c) = min(1, max(others_i, c a_i))``, float64 ``[m]``.
    least, aim : float
        Where to begin, and the half-width over the quantile.

    Returns
    -------
    float
    """

    def width(c: float) -> float:
        pi = torch.maximum(others, c * share).clamp(max=1)
        return sum(math.sqrt(max(0.0, variance(deviation2, weight, pi))) for deviation2 in deviations2)

    if width(least) <= aim:
        return least
    low, high = least, 2 * least
    while width(high) > aim and high < MOST_SCALE:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if width(middle) <= aim else (middle, high)
    return high


def sample_size(sigma: float, tau: float, z: float, population: int) -> float:
    """Paper's budget ``(z N sigma / tau)^2`` (Lemma 4.1) with the finite-population correction.

    For target ``sdpa`` the best split of Theorem 4.3 gives ``z sigma / tau = 2 (z_N sigma_N / |Nv| + z_D sigma_D / D) /
    eps``: the budget ``max(b_N(eps1), b_D(eps2))`` is least where both are equal, and both half-widths fall like
    ``sqrt(1/b - 1/N)``.
    """
    infinite = (z * population * sigma / tau) ** 2 if tau > 0 else math.inf
    return float(population) if math.isinf(infinite) else population * infinite / (population + infinite)
