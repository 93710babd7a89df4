"""Layout of the runtime parameters that the ops read from device memory.

One float32 row per layer, so that a new epsilon takes effect between two replays of a captured graph:
``[epsilon, delta, L, L', q_0 .. q_32, q'_0 .. q'_32]``. ``q_j`` is the bound's quantile at ``1/nu = j/64``; the ops
interpolate linearly in ``1/nu``, which errs on the safe side because the quantile is convex there, and clamp at
``nu = 2``. ``L`` is `vattn_kernels.quantiles.log_term`. Primed values stand at ``delta / 2``: target ``sdpa`` bounds
numerator and denominator with half of delta each.
"""

from __future__ import annotations

import functools
import math

from vattn_kernels import dimensions
from vattn_kernels.quantiles import log_term, quantile

EPSILON = 0
DELTA = 1
LOG = 2
SPLIT_LOG = 3
TABLE = 4
TABLE_POINTS = 33
TABLE_STEPS_PER_UNIT = 64
SPLIT_TABLE = TABLE + TABLE_POINTS
PARAMS_WIDTH = SPLIT_TABLE + TABLE_POINTS
SPLIT = 0.5


def pack(epsilon: float, delta: float, bound: str, dims: float = dimensions.MOST) -> list[float]:
    """Row of the parameter table for one layer.

    Parameters
    ----------
    epsilon : float
        Bound on the relative error.
    delta : float
        Probability with which the bound may fail, per head and step.
    bound : {"f8", "student", "clt", "bernstein"}
        See `vattn_kernels.quantiles.quantile`.
    dims : float
        Effective dimensions of the layer's values; bound ``f8`` only.

    Returns
    -------
    list of float
        ``PARAMS_WIDTH`` values.
    """
    return [epsilon, delta, *_quantiles(delta, bound, dims)]


@functools.lru_cache(maxsize=64)
def _quantiles(delta: float, bound: str, dims: float) -> tuple[float, ...]:
    levels = (delta, SPLIT * delta)
    degrees = [math.inf if j == 0 else TABLE_STEPS_PER_UNIT / j for j in range(TABLE_POINTS)]
    tables = (quantile(bound, level, nu, dims) for level in levels for nu in degrees)
    return (*(log_term(bound, level) for level in levels), *tables)
