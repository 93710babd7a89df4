"""Effective dimensions of values, from which bound ``f8`` takes its quantile."""

from __future__ import annotations

import math

import torch

# What ``f8`` presumes of values that vary in as many directions or more.
MOST = 8.0
LEAST = 1.0
# Rounded down to so few grades that layers share their tables of quantiles.
GRADES_PER_UNIT = 4


def effective(values: torch.Tensor) -> float:
    """Participation ratio ``tr(S)^2 / tr(S^2)`` of the values' covariance S, that of the KV head with the least.

    A sampled output errs by a weighted sum of values less their mean. Where weights do not depend on the values, the
    error varies in as many directions as they do; the squared error of fewer spreads more, and a quantile of more fails
    too often. Heavy tokens that vary in fewer directions than the light ones are not seen.

    Parameters
    ----------
    values : torch.Tensor
        ``[num_tokens, num_kv_heads, head_dim]``, any floating dtype.

    Returns
    -------
    float
        From `LEAST` to `MOST`, rounded down to a quarter; `LEAST` of values that do not vary.
    """
    centred = values.double() - values.double().mean(0)
    covariance = torch.einsum("nhd,nhe->hde", centred, centred)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = float((trace.square() / covariance.square().sum((-2, -1))).nan_to_num(LEAST).min())
    return min(MOST, max(LEAST, math.floor(ratio * GRADES_PER_UNIT) / GRADES_PER_UNIT))
