"""Quantiles of the bounds: the one place where confidence becomes a factor, and which bound suits which target."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from vattn_kernels import dimensions

BOUNDS = ("f8", "student", "clt", "bernstein")
# An error of one dimension leaves f8's ellipsoid far too often, and three of the four targets bound one.
BOUNDS_OF_TARGET = {
    "output": BOUNDS,
    "denominator": ("student", "clt", "bernstein"),
    "numerator": ("student", "clt", "bernstein"),
    "sdpa": ("student", "clt", "bernstein"),
}
TARGETS = tuple(BOUNDS_OF_TARGET)
# Selectors that bound every logit from above, which bernstein rests on: signatures of keys bound nothing.
PROVABLE_SELECTORS = ("sketch", "oracle", "quest")
# Selectors whose scores are off by more than the norms of values differ. The tokens that matter most have short values,
# so a norm would push them down; and what a cap leaves uncertified is too noisy to serve unshrunk (RESULTS.md of the
# benchmarks), which only a CPU does for now.
COARSE_SELECTORS = ("quest", "sign", "hash")
# Those whose scores rank tokens better than they weigh them, so that a cap gives most of its reads to the best.
RANKING_SELECTORS = ("quest", "hash")
# Sample sizes at which bernstein may stop: a geometric grid of so many steps, its start, and the cap.
GRID_STEPS = 16
LOOKS = GRID_STEPS + 2
EVENTS = 3


def default_bound(sampler: str, target: str) -> str:
    """Bound that a sampler and target are used with unless the settings name one.

    ``f8`` belongs to the vector-valued error of ``proportional`` with target ``output``: the error of a scalar such as
    the denominator has one dimension and leaves it far too often, and the numerator's lies along the values' mean.

    Parameters
    ----------
    sampler : {"proportional", "uniform"}
        Sampler.
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about.
    """
    return "f8" if (sampler, target) == ("proportional", "output") else "student"


def quantile(bound: str, delta: float, nu: float, dims: float = dimensions.MOST) -> float:
    """Factor by which a standard error is multiplied so that it covers with probability ``1 - delta``.

    Parameters
    ----------
    bound : {"f8", "student", "clt", "bernstein"}
        ``clt``: two-sided normal quantile, ``Phi^-1(1 - delta/2)`` (paper, Lemma 4.1).
        ``student``: ``t_nu(1 - delta/2)``, Stein's two-stage argument.
        ``f8``: ``sqrt(F(dims, nu)^-1(1 - delta))``, the norm of an error with so many effective dimensions, eight at
        most; values that vary in fewer break it (``tests/kernels/test_violations.py``). It matches two moments
        (Satterthwaite): for one large direction among many small ones delta .05 becomes .054, but .01 becomes .019.
        ``bernstein``: ``sqrt(2 L)`` with L of `log_term`, the factor of the variance term of
        `vattn_kernels.reference.bernstein`; the range term comes on top.
    delta : float
        Probability of failure, in (0, 1).
    nu : float
        Effective degrees of freedom of the variance estimate; ``inf`` is allowed.
    dims : float
        From `vattn_kernels.dimensions.effective`; bound ``f8`` only.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If ``bound`` is unknown.
    """
    if bound == "clt":
        return float(stats.norm.isf(delta / 2))
    if bound == "student":
        return float(stats.t.isf(delta / 2, nu))
    if bound == "f8":
        if math.isinf(nu):
            return float(np.sqrt(stats.chi2.isf(delta, dims) / dims))
        return float(np.sqrt(stats.f.isf(delta, dims, nu)))
    if bound == "bernstein":
        return math.sqrt(2 * log_term(bound, delta))
    raise ValueError(f"unknown bound {bound!r}: expected one of {', '.join(BOUNDS)}")


def log_term(bound: str, delta: float) -> float:
    """``L = ln(EVENTS * LOOKS / delta)`` of ``bernstein``, 0 for the other bounds.

    Each look at the sample may fail in three events of probability ``exp(-L)`` (two for the error's tail, one for the
    variance's), and the stopping rule may choose among `LOOKS` looks: a union bound over all of them.

    Parameters
    ----------
    bound : {"f8", "student", "clt", "bernstein"}
        Bound.
    delta : float
        Probability of failure, in (0, 1).

    Returns
    -------
    float
    """
    return math.log(EVENTS * LOOKS / delta) if bound == "bernstein" else 0.0
