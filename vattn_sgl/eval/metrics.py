"""What a run of head-steps amounts to: violations, the heads that bind, and what chance allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats as distributions

from vattn_sgl.eval.capture import Geometry

FAMILY_ALPHA = 0.05
HALF_WIDTH = 2
NEAR = 0.9


@dataclass
class Tally:
    """Sums over the head-steps of one row of the report.

    A head *binds* in a step when its half-width, as the final sample supports it, is the largest of its KV group or
    within 10 % of epsilon: a head's scale grows until its half-width is at most epsilon, so these are the heads that
    the sample grew for. A group that read everything has half-widths 0 and no binding head.
    """

    geometry: Geometry
    epsilon: float
    violations: torch.Tensor = field(init=False)
    steps: torch.Tensor = field(init=False)
    binding_steps: int = 0
    binding_violations: int = 0
    density_sum: float = 0.0
    layer_density: torch.Tensor = field(init=False)
    errors: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.geometry.num_layers, self.geometry.num_qo_heads)
        self.violations = torch.zeros(shape, dtype=torch.int64)
        self.steps = torch.zeros(shape, dtype=torch.int64)
        self.layer_density = torch.zeros(shape[0], dtype=torch.float64)

    def add(self, layer: int, out: torch.Tensor, stats: torch.Tensor, exact: torch.Tensor) -> None:
        """Count one layer's steps.

        Parameters
        ----------
        layer : int
            Layer.
        out, exact : torch.Tensor
            ``[batch, num_qo_heads, head_dim]``, approximate and exact.
        stats : torch.Tensor
            ``[batch, num_qo_heads, 6]``, columns `vattn_kernels.ops.STATS`.
        """
        error = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)  # [B, H]
        # A NaN violates.
        over = ~(error <= self.epsilon)
        self.violations[layer] += over.sum(0)
        self.steps[layer] += over.shape[0]
        binding = binding_heads(stats[..., HALF_WIDTH], self.geometry.group, self.epsilon)
        self.binding_steps += int(binding.sum())
        self.binding_violations += int((binding & over).sum())
        self.density_sum += float(stats[..., 0].double().sum())
        self.layer_density[layer] += float(stats[..., 0].double().sum())
        self.errors.append(error.float().flatten())

    @property
    def head_steps(self) -> int:
        """Number of (layer, query head, step)."""
        return int(self.steps.sum())

    @property
    def density(self) -> float:
        """Mean share of the context that was read."""
        return self.density_sum / self.head_steps

    def mean_error(self) -> float:
        """Mean relative error."""
        return float(torch.cat(self.errors).mean())

    def row(self, delta: float) -> dict[str, float | int]:
        """The row's figures."""
        errors = torch.cat(self.errors)
        return {
            "head_steps": self.head_steps,
            "density": self.density,
            "violation_rate": int(self.violations.sum()) / self.head_steps,
            "binding_violation_rate": self.binding_violations / max(1, self.binding_steps),
            "heads_over_delta": heads_over(self.violations, self.steps, delta),
            "mean_error": self.mean_error(),
            "p95_error": float(errors.kthvalue(max(1, round(0.95 * errors.numel()))).values),
        }


def binding_heads(half_width: torch.Tensor, group: int, epsilon: float) -> torch.Tensor:
    """Heads whose half-width is the largest of their KV group or near epsilon, and above 0, bool ``[batch, heads]``.

    Parameters
    ----------
    half_width : torch.Tensor
        ``[batch, num_qo_heads]``.
    group : int
        Query heads per KV head.
    epsilon : float
        Bound; `NEAR` of it is near.
    """
    grouped = half_width.unflatten(1, (-1, group))
    first = torch.nn.functional.one_hot(grouped.argmax(-1), group).bool()
    return ((first | (grouped >= NEAR * epsilon)) & (grouped > 0)).flatten(1)


def heads_over(violations: torch.Tensor, steps: torch.Tensor, delta: float) -> int:
    """Heads whose violations exceed delta beyond chance.

    One-sided binomial test of ``violations > delta * steps`` for each head, at a level of `FAMILY_ALPHA` over all heads
    together (Bonferroni): were every head's true rate delta, the count would be 0 in at least 95 % of runs.

    Parameters
    ----------
    violations, steps : torch.Tensor
        int64 counts of each head.
    delta : float
        Rate claimed; 0 counts no head.
    """
    if delta <= 0:
        return 0
    chance = distributions.binom.sf(violations.numpy() - 1, steps.numpy(), delta)
    return int((chance < FAMILY_ALPHA / violations.numel()).sum())


def each_head(tallies: Sequence[Tally], delta: float) -> dict[str, Any]:
    """What the counts of every head amount to over several texts.

    Parameters
    ----------
    tallies : sequence of Tally
        Of one model, at least one.
    delta : float
        Rate claimed.

    Returns
    -------
    dict
        ``steps`` of a head, ``density``, ``violation_rate`` of all heads, ``heads_over_delta``, ``detectable_rate`` and
        ``worst``, the three heads that violate most, each ``{"layer", "head", "rate"}``.
    """
    violations, steps = (sum(getattr(t, name) for t in tallies) for name in ("violations", "steps"))
    rates = violations / steps
    heads = rates.shape[1]
    return {
        "steps": int(steps.min()),
        "density": sum(t.density_sum for t in tallies) / int(steps.sum()),
        "violation_rate": int(violations.sum()) / int(steps.sum()),
        "heads_over_delta": heads_over(violations, steps, delta),
        "detectable_rate": detectable_rate(int(steps.min()), steps.numel(), delta),
        "worst": [
            {"layer": i // heads, "head": i % heads, "rate": float(rates.flatten()[i])}
            for i in rates.flatten().topk(3).indices.tolist()
        ],
    }


def detectable_rate(steps: int, heads: int, delta: float, power: float = 0.9) -> float:
    """Least true violation rate that `heads_over` finds in a head with the given power.

    Parameters
    ----------
    steps : int
        Steps per head.
    heads : int
        Heads tested together.
    delta : float
        Rate claimed.
    power : float
        Probability to find it.
    """
    threshold = int(distributions.binom.isf(FAMILY_ALPHA / heads, steps, delta)) + 1
    low, high = delta, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if distributions.binom.sf(threshold - 1, steps, middle) < power else (low, middle)
    return high
