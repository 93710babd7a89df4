"""Layout of the runtime parameters that the ops read from device memory.

One float32 row per layer, so that a new epsilon takes effect between two replays of a captured graph:
``[epsilon, delta, q_0 .. q_32]``. ``q_j`` is the bound's quantile at ``1/nu = j/64``; the ops interpolate
linearly in ``1/nu``, which errs on the safe side because the quantile is convex there, and clamp at ``nu = 2``.
"""

from __future__ import annotations

import math

from vattn_kernels.quantiles import quantile

EPSILON = 0
DELTA = 1
TABLE = 2
TABLE_POINTS = 33
TABLE_STEPS_PER_UNIT = 64
PARAMS_WIDTH = TABLE + TABLE_POINTS


def pack(epsilon: float, delta: float, bound: str) -> list[float]:
    """Row of the parameter table for one layer.

    Parameters
    ----------
    epsilon : float
        Bound on the relative error.
    delta : float
        Probability with which the bound may fail, per head and step.
    bound : {"f8", "student", "clt"}
        See `vattn_kernels.quantiles.quantile`.

    Returns
    -------
    list of float
        ``PARAMS_WIDTH`` values.
    """
    table = [quantile(bound, delta, math.inf if j == 0 else TABLE_STEPS_PER_UNIT / j) for j in range(TABLE_POINTS)]
    return [epsilon, delta, *table]
