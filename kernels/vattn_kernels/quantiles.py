"""Quantiles of the bounds: the one place where confidence becomes a factor."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

BOUNDS = ("f8", "student", "clt")


def default_bound(sampler: str, target: str) -> str:
    """Bound that a sampler and target are used with unless the settings name one.

    ``f8`` belongs to the vector-valued error of ``proportional`` with target ``output``: the error of a scalar such as
    the denominator has one dimension and leaves it far too often.

    Parameters
    ----------
    sampler : {"proportional", "uniform"}
        Sampler.
    target : {"output", "denominator"}
        What the bound is about.
    """
    return "f8" if (sampler, target) == ("proportional", "output") else "student"


def quantile(bound: str, delta: float, nu: float) -> float:
    """Factor by which a standard error is multiplied so that it covers with probability ``1 - delta``.

    Parameters
    ----------
    bound : {"f8", "student", "clt"}
        ``clt``: two-sided normal quantile, ``Phi^-1(1 - delta/2)`` (paper, Lemma 4.1).
        ``student``: ``t_nu(1 - delta/2)``, Stein's two-stage argument.
        ``f8``: ``sqrt(F(8, nu)^-1(1 - delta))``, the norm of an error with eight effective dimensions; values that
        vary in fewer break it (12 % violations in one dimension, ``tests/kernels/test_violations.py``).
    delta : float
        Probability of failure, in (0, 1).
    nu : float
        Effective degrees of freedom of the variance estimate; ``inf`` is allowed.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If ``bound`` is unknown.
    """
    if bound == "clt":
        return float(stats.norm.ppf(1 - delta / 2))
    if bound == "student":
        return float(stats.t.ppf(1 - delta / 2, nu))
    if bound == "f8":
        if math.isinf(nu):
            return float(np.sqrt(stats.chi2.ppf(1 - delta, 8) / 8))
        return float(np.sqrt(stats.f.ppf(1 - delta, 8, nu)))
    raise ValueError(f"unknown bound {bound!r}: expected one of {', '.join(BOUNDS)}")
