"""The ratio estimate from a fixed set and a weighted sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LEAST_UNIT = 1e-15
# Most of the denominator that one token may stand for beside itself, once an estimate is shrunk.
MOST_SHARE = 0.06
# Errors that a target bounds, each relative to its own norm, and the factor of their sum.
PARTS = {
    "output": ("output",),
    "denominator": ("denominator",),
    "numerator": ("numerator",),
    "sdpa": ("numerator", "denominator"),
}
FACTOR = {"output": 1.0, "denominator": 1.0, "numerator": 1.0, "sdpa": 2.0}


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
    upper : torch.Tensor, optional
        float64 ``[N]`` provable upper bounds on the range's logits; bound ``bernstein`` only.
    upper_norm : torch.Tensor, optional
        float64 ``[N]`` provable upper bounds on ``|v|`` of the range; bound ``bernstein`` only.
    estimated_mass : float
        Logarithm of D as the scores have it, which their shares are relative to.
    """

    logits: torch.Tensor
    values: torch.Tensor
    fixed: torch.Tensor
    upper: torch.Tensor | None = None
    upper_norm: torch.Tensor | None = None
    estimated_mass: float = -math.inf


@dataclass
class Part:
    """An error that is bounded.

    Attributes
    ----------
    vectors : torch.Tensor
        ``y_i`` (denominator), ``y_i v_i`` (numerator) or ``y_i (v_i - o)`` (output) of the tokens read, float64
        ``[m, dim]``; ``dim`` is 1 for the denominator.
    unit : float
        ``D`` or ``D |o| = |Nv|``: what epsilon is relative to.
    """

    vectors: torch.Tensor
    unit: float

    @property
    def relative2(self) -> torch.Tensor:
        """``d_i^2 / unit^2``, float64 ``[m]``."""
        return self.vectors.square().sum(-1) / self.unit**2


@dataclass
class Estimate:
    """``o = Nv / D`` and what the bound needs.

    Attributes
    ----------
    out : torch.Tensor
        float64 ``[head_dim]``.
    parts : dict of str to Part
        Errors that are bounded, by name.
    maximum : float
        ``m`` of ``y_i = exp(l_i - m)``.
    log_mass : float
        Logarithm of D.
    residual : float
        Share of the mass that does not come from the fixed set.
    """

    out: torch.Tensor
    parts: dict[str, Part]
    maximum: float
    log_mass: float
    residual: float


def parts_of(target: str, bernstein: bool) -> tuple[str, ...]:
    """Names of the parts; ``bernstein`` needs the denominator beside the output (`vattn_kernels.reference.bernstein`).

    Parameters
    ----------
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about.
    bernstein : bool
        Whether the bound is ``bernstein``.
    """
    return (*PARTS[target], "denominator") if bernstein and target == "output" else PARTS[target]


def estimate(head: Head, read: torch.Tensor, weight: torch.Tensor, target: str, bernstein: bool = False) -> Estimate:
    """``D = sum_F w + sum_S weight y`` and likewise ``Nv``; then the residuals of every part around them.

    Parameters
    ----------
    head : Head
        The head.
    read : torch.Tensor
        int64 ``[m]`` positions read outside the fixed set.
    weight : torch.Tensor
        float64 ``[m]`` inverse inclusion probabilities.
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about.
    bernstein : bool
        Whether the bound is ``bernstein``.
    """
    everything = torch.cat([head.logits[head.fixed], head.logits[read]])
    m = everything.max()
    fixed = (head.logits[head.fixed] - m).exp()
    mass = (head.logits[read] - m).exp()
    values = head.values[read]
    denominator = fixed.sum() + (weight * mass).sum()
    numerator = fixed @ head.values[head.fixed] + (weight * mass) @ values
    out = numerator / denominator
    units = {"output": denominator * out.norm(), "denominator": denominator, "numerator": numerator.norm()}
    gaps = {"output": values - out, "denominator": torch.ones_like(mass)[:, None], "numerator": values}
    parts = {
        name: Part(mass[:, None] * gaps[name], max(float(units[name]), LEAST_UNIT))
        for name in parts_of(target, bernstein)
    }
    return Estimate(out, parts, float(m), float(m + denominator.log()), 1 - float(fixed.sum() / denominator))


def shrunk(head: Head, unbiased: Estimate, read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``o0 + B^2 / (B^2 + V) (o1 - o0)``: between attention over what was read and the estimate from it.

    o0 takes every weight as 1; it lies off by its bias, which ``B = |o1 - o0|`` tells, and o1 by its variance V (James
    and Stein 1961). o1 takes no weight beyond `MOST_SHARE` of the denominator: a token whose score missed it stands for
    others that it is unlike (truncated importance sampling, Ionides 2008). It serves a step that a cap left uncertified
    by coarse scores, whose few large weights are mostly noise; where values lean on the scores it may err more.

    Parameters
    ----------
    head : Head
        The head.
    unbiased : Estimate
        Of target ``output``, by the weights as they are.
    read : torch.Tensor
        int64 ``[m]`` positions read outside the fixed set.
    weight : torch.Tensor
        float64 ``[m]`` inverse inclusion probabilities.

    Returns
    -------
    torch.Tensor
        float64 ``[head_dim]``.
    """
    mass = (head.logits[read] - unbiased.maximum).exp()
    denominator = (head.logits[head.fixed] - unbiased.maximum).exp().sum() + weight @ mass
    weight = 1 + torch.minimum(weight - 1, MOST_SHARE * denominator / mass)
    plain, drawn = (estimate(head, read, w, "output") for w in (torch.ones_like(weight), weight))
    variance = (weight * (weight - 1) * drawn.parts["output"].relative2).sum() * drawn.out.square().sum()
    gap = (drawn.out - plain.out).square().sum()
    return torch.where(gap + variance > 0, plain.out + gap / (gap + variance) * (drawn.out - plain.out), drawn.out)
