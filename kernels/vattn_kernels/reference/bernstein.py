"""Bernstein bounds for both samplers: valid at every sample size, in every dimension, at every stopping time.

Three lemmas carry them. ``x_i`` are the vectors of a part (`vattn_kernels.reference.estimate.Part`; a scalar is a
vector of one dimension), ``L`` is `vattn_kernels.quantiles.log_term`.

1. Pinelis 1994, Theorem 3.4, in a Hilbert space: independent zero-mean ``X_i`` with ``|X_i| <= R`` and
   ``sum E|X_i|^2 <= B^2`` have ``P(|sum X_i| >= r) <= 2 exp(-r^2 / (2 B^2 + 2 R r / 3))``. Hence
   ``|sum X_i| <= sqrt(2 L) B + 2/3 R L`` but for probability ``2 exp(-L)``.
2. Maurer 2003, Theorem 2.1: independent ``Z_i`` in ``[0, M]`` have ``P(E - sum Z_i >= t) <= exp(-t^2 / (2 M E))`` with
   ``E = E sum Z_i``. Hence ``sqrt(E) <= sqrt(sum Z_i) + sqrt(2 M L)`` but for probability ``exp(-L)``. With ``Z_i`` the
   terms of the variance this is the empirical step of Maurer and Pontil 2009, Theorem 4.
3. Hoeffding 1963, Theorem 4: a convex function of a sum has no larger mean without replacement than with it. Both
   bounds above rest on such a mean (``cosh(t |.|)`` and ``exp(-t .)``), so they hold for sampling without replacement.

The stopping rule looks at the sample at no more than `vattn_kernels.quantiles.LOOKS` sizes that are fixed before the
sample is drawn; L is a union bound over these looks, so it does not matter which of them the sample chooses.
"""

from __future__ import annotations

import math

import torch

from vattn_kernels.quantiles import GRID_STEPS
from vattn_kernels.reference.estimate import FACTOR, Head

VARIANCE_AND_RANGE = 8 / 3
RANGE = 2 / 3


def poisson(spread: float, reach: float, log: float) -> float:
    """Error of a Poisson sample: ``sqrt(2 L) spread + 8/3 L reach``.

    Lemma 1 for ``X_i = (I_i / pi_i - 1) x_i``, whose norm is at most ``|x_i| / pi_i``; lemma 2 for
    ``Z_i = I_i (1 - pi_i) |x_i|^2 / pi_i^2 <= reach^2``, whose mean is the variance: ``B <= spread + sqrt(2 L) reach``.

    Parameters
    ----------
    spread : float
        ``sqrt(V)``, V the estimated variance.
    reach : float
        Upper bound on ``|x_i| / pi_i`` over all tokens with ``pi_i < 1``.
    log : float
        L.
    """
    return math.sqrt(2 * log) * spread + VARIANCE_AND_RANGE * log * reach


def uniform(sigma: float, reach: float, log: float, size: int, population: int) -> float:
    """Error of the total of a population from ``size`` draws without replacement.

    Let ``E`` be the error of the mean ``mu`` and ``f = min(1, (N - b) / b)``: for ``b > N/2`` the tokens left out are
    the smaller sample, and their mean gives away the same error. Lemmas 1 and 3 give
    ``E <= sqrt(2 L f / b) s + 2/3 R L / b`` with the population's deviation s; lemmas 2 and 3 for ``|x_i - mu|^2`` give
    ``s <= sigma + E + R sqrt(2 L / b)``, because the sample's mean square around mu is at most ``sigma^2 + E^2``.
    Solved for E.

    Parameters
    ----------
    sigma : float
        Deviation of the sample.
    reach : float
        Upper bound R on ``|x_i - mu|``.
    log : float
        L.
    size, population : int
        ``b`` and ``N``.

    Returns
    -------
    float
        ``N E``; infinite where b is too small for any statement.
    """
    if size == population:
        return 0.0
    rate = math.sqrt(2 * log * min(1.0, (population - size) / size) / size)
    if rate >= 1:
        return math.inf
    error = rate * (sigma + reach * math.sqrt(2 * log / size)) + RANGE * reach * log / size
    return population * error / (1 - rate)


def relative(width: float) -> float:
    """``h / (1 - h)``: from an error relative to the estimate to one relative to the truth, ``|x| >= |x^| (1 - h)``."""
    return width / (1 - width) if width < 1 else math.inf


def combine(target: str, widths: dict[str, float]) -> float:
    """Relative half-width of a target from those of its parts, each relative to its estimate.

    Target ``output``: ``(o^ - o) D^ = sum_i (weight_i - 1) y_i (v_i - o)`` with the true o, of mean zero. Its bound is
    linear in the residuals' spread and reach, so replacing o by ``o^`` adds at most ``|o^ - o|`` times the bound of D:
    ``|o^ - o| <= H_output / (D^ - H_D)``. Target ``sdpa``: Lemma 4.2 of the paper, ``2 (eps1 + eps2)``.

    Parameters
    ----------
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about.
    widths : dict of str to float
        By part, as `vattn_kernels.reference.estimate.parts_of` names them.
    """
    if target == "output":
        left = 1 - widths["denominator"]
        return relative(widths["output"] / left) if left > 0 else math.inf
    return FACTOR[target] * sum(relative(width) for width in widths.values())


def grid(first: float, last: float) -> list[float]:
    """Geometric grid of ``GRID_STEPS + 1`` points from ``first`` to ``last``."""
    ratio = max(last / first, 1.0)
    return [first * ratio ** (step / GRID_STEPS) for step in range(GRID_STEPS)] + [max(first, last)]


def reaches(head: Head, open_: torch.Tensor, log_scale: torch.Tensor, maximum: float, out: float) -> dict[str, float]:
    """Upper bound by part on ``|x_i| exp(log_scale_i)`` over the tokens of the range that are not read for certain.

    Parameters
    ----------
    head : Head
        With `Head.upper` and `Head.upper_norm`.
    open_ : torch.Tensor
        bool ``[N]``, the tokens that count.
    log_scale : torch.Tensor
        float64 ``[N]``.
    maximum, out : float
        ``m`` and ``|o|``.
    """
    assert head.upper is not None and head.upper_norm is not None
    if not bool(open_.any()):
        return {"denominator": 0.0, "numerator": 0.0, "output": 0.0}
    mass = head.upper[open_] + log_scale[open_] - maximum
    masses = float(mass.max().exp())
    values = float((mass + head.upper_norm[open_].log()).max().exp())
    return {"denominator": masses, "numerator": values, "output": values + out * masses}
