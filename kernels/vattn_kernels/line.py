"""Calibrated line from a selector's raw score to a logit: what makes a ranking a weight with small log-error.

A raw score ``x`` with its unit ``u`` (both per query and token) becomes the estimated logit
``sm_scale q . mean + level + slope x + offset u``. The three numbers are those at which sampling in proportion costs
least, not those of a least-squares fit, which the bulk of light tokens decides: on SmolLM2-135M the mean inefficiency
of 64 sign bits is 339 by least squares and 47 so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from vattn_kernels.sketch import Moments

# ``(layer, head, q [n, group, head_dim], k [m, head_dim], mean) -> raw, unit [n * group, m], base [n * group]``
Features = Callable[
    [int, int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]

LEVEL, SLOPE, OFFSET = range(3)
LINE_WIDTH = 3
# Pulls to a flat score, which is uniform sampling: a useless selector gains less than this costs.
RIDGE = 1e-3
STEPS = 12
LEAST_GAIN = 1e-4
LEAST_STEP = 1e-3


@dataclass
class LineTables:
    """What a line-calibrated selector needs beside its side data, stacked over layers.

    Attributes
    ----------
    mean : torch.Tensor
        float32 ``[num_layers, num_kv_heads, head_dim]`` mean key.
    line : torch.Tensor
        float32 ``[num_layers, num_kv_heads, 3]``: level, slope, offset.
    """

    mean: torch.Tensor
    line: torch.Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device | str) -> LineTables:
        """Tables of a selector that is not calibrated yet."""
        rows = (num_layers, num_kv_heads)
        return cls(torch.zeros(*rows, head_dim, device=device), torch.zeros(*rows, LINE_WIDTH, device=device))

    def to(self, device: torch.device | str) -> LineTables:
        """Copy on another device."""
        return LineTables(**{f.name: getattr(self, f.name).to(device).contiguous() for f in fields(self)})

    def copy_(self, other: LineTables) -> None:
        """Overwrite in place, so that captured graphs keep their addresses."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))


def solve(
    moments: Moments, queries: torch.Tensor, keys: torch.Tensor, sm_scale: float, features: Features
) -> LineTables:
    """Mean keys and lines of every layer and KV head.

    Parameters
    ----------
    moments : Moments
        Of calibration queries and keys, after RoPE.
    queries : torch.Tensor
        ``[num_layers, n, num_qo_heads, head_dim]`` sample of queries.
    keys : torch.Tensor
        ``[num_layers, m, num_kv_heads, head_dim]`` sample of keys.
    sm_scale : float
        Factor of the logits.
    features : callable
        Raw scores of one layer and KV head.

    Returns
    -------
    LineTables
    """
    num_layers, num_kv_heads, head_dim = moments.k.shape
    tables = LineTables.zeros(num_layers, num_kv_heads, head_dim, moments.k.device)
    tables.mean.copy_(moments.k / moments.k_count.clamp(min=1)[:, None, None])
    for layer in range(num_layers):
        grouped = queries[layer].float().unflatten(1, (num_kv_heads, -1))  # [n, H, G, D]
        for head in range(num_kv_heads):
            q, k = grouped[:, head], keys[layer, :, head].float()
            raw, unit, base = features(layer, head, q, k, tables.mean[layer, head])
            logits = sm_scale * q.flatten(0, 1) @ k.T - base[:, None]
            tables.line[layer, head] = fit(raw, unit, logits)
    return tables


def apply(line: torch.Tensor, raw: torch.Tensor, unit: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Estimated logits.

    Parameters
    ----------
    line : torch.Tensor
        ``[3]`` of one KV head.
    raw, unit : torch.Tensor
        ``[queries, n]`` raw scores and their units, in logits.
    base : torch.Tensor
        ``[queries]`` logits of the mean key.

    Returns
    -------
    torch.Tensor
        ``[queries, n]``.
    """
    return base[:, None] + line[LEVEL] + line[SLOPE] * raw + line[OFFSET] * unit


def inefficiency(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Log of the samples that scores need over those that exact scores need: ``sum w^2/s * sum s / (sum w)^2``.

    Parameters
    ----------
    logits, scores : torch.Tensor
        ``[queries, n]`` exact logits and log scores; either may be shifted by a constant per query.

    Returns
    -------
    torch.Tensor
        ``[queries]``, 0 or more.
    """
    return (2 * logits - scores).logsumexp(-1) + scores.logsumexp(-1) - 2 * logits.logsumexp(-1)


def fit(raw: torch.Tensor, unit: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Line at which the mean log inefficiency of proportional sampling is least; convex, by Newton's method.

    Starts from the flat score and only descends, so on the calibration data it is never worse than uniform sampling.

    Parameters
    ----------
    raw, unit : torch.Tensor
        ``[queries, n]`` raw scores and units.
    logits : torch.Tensor
        ``[queries, n]`` exact logits less the mean key's.

    Returns
    -------
    torch.Tensor
        float32 ``[3]``; the slope is 0 or more.
    """
    logits = logits.double()
    features = torch.stack([raw, unit], -1).double()
    weights = _descend(features, logits)
    if weights[0] < 0:
        # A score that falls as the logit rises has been learned from noise.
        weights = _descend(features * torch.tensor([0.0, 1.0], device=raw.device), logits)
        weights[0] = 0.0
    level = (logits.logsumexp(-1) - (features @ weights).logsumexp(-1)).mean()
    return torch.cat([level[None], weights]).float()


def _descend(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Minimum of mean log inefficiency plus the ridge, over the weights of ``[queries, n, 2]`` features."""
    queries, _, width = features.shape
    flat = features.flatten(0, 1)
    # A constant feature says nothing about tokens; the second term keeps it from being blown up.
    scale = torch.maximum(flat.std(0), 0.01 * flat.square().mean(0).sqrt()).clamp(min=1e-9)
    features = features / scale
    ridge = RIDGE * torch.eye(width, dtype=torch.float64, device=features.device)

    def cost(at: torch.Tensor) -> torch.Tensor:
        return inefficiency(logits, features @ at).mean() + at @ ridge @ at

    weights = torch.zeros(width, dtype=torch.float64, device=features.device)
    current = cost(weights)
    for _ in range(STEPS):
        scores = features @ weights
        gradient, hessian = 2 * ridge @ weights, 2 * ridge
        for share, sign in (((2 * logits - scores).softmax(-1), -1.0), (scores.softmax(-1), 1.0)):
            weighted = share[..., None] * features  # [Q, N, F]
            mean = weighted.sum(1)
            gradient = gradient + sign * mean.mean(0)
            second = weighted.flatten(0, 1).T @ features.flatten(0, 1)
            hessian = hessian + (second - mean.T @ mean) / queries
        step = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while not (trial := cost(weights - length * step)) < current and length > LEAST_STEP:
            length /= 2
        if not trial < current:
            break
        weights = weights - length * step
        gain, current = current - trial, trial
        if gain < LEAST_GAIN:
            break
    return weights / scale
