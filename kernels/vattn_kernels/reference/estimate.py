"""The ratio estimate from a fixed set and a weighted sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEAST_UNIT = 1e-15


@dataclass
class Head:
    """One query head's view of a request.

    Attributes
    ----------
    logits : torch.Tensor
        float64 ``[n]``, exact.
    values : torch.Tensor
        float64 ``[n, head_dim]``.
    fixed : torch.Tensor
        bool ``[n]``, sink and window.
    """

    logits: torch.Tensor
    values: torch.Tensor
    fixed: torch.Tensor


@dataclass
class Estimate:
    """``o = Nv / D`` and what the bound needs.

    Attributes
    ----------
    out : torch.Tensor
        float64 ``[head_dim]``.
    mass : torch.Tensor
        ``y_i = exp(l_i - m)`` of the tokens read, float64 ``[m]``.
    deviation2 : torch.Tensor
        ``d_i^2`` of the tokens read, float64 ``[m]``.
    unit : float
        ``D |o|`` or ``D``: what epsilon is relative to.
    residual : float
        Share of the mass that does not come from the fixed set.
    """

    out: torch.Tensor
    mass: torch.Tensor
    deviation2: torch.Tensor
    unit: float
    residual: float


def estimate(head: Head, read: torch.Tensor, weight: torch.Tensor, target: str) -> Estimate:
    """``D = sum_F w + sum_S weight y`` and likewise ``Nv``; then ``d_i^2`` around their ratio.

    Parameters
    ----------
    head : Head
        The head.
    read : torch.Tensor
        int64 ``[m]`` positions read outside the fixed set.
    weight : torch.Tensor
        float64 ``[m]`` inverse inclusion probabilities.
    target : {"output", "denominator"}
        What the bound is about.
    """
    everything = torch.cat([head.logits[head.fixed], head.logits[read]])
    m = everything.max()
    fixed = (head.logits[head.fixed] - m).exp()
    mass = (head.logits[read] - m).exp()
    denominator = fixed.sum() + (weight * mass).sum()
    numerator = fixed @ head.values[head.fixed] + (weight * mass) @ head.values[read]
    out = numerator / denominator
    gap = (head.values[read] - out).square().sum(-1) if target == "output" else torch.ones_like(mass)
    unit = max(float(denominator * (out.norm() if target == "output" else 1.0)), LEAST_UNIT)
    return Estimate(out, mass, mass.square() * gap, unit, 1 - float(fixed.sum() / denominator))
