"""Scores of the range: estimated share of the output (or of the mass), shared by the KV group."""

from __future__ import annotations

import torch

from vattn_kernels.reference import rng

TINY = 1e-30
MAX_EXPONENT = 60.0
# Rounding of a float32 logit against the exact one; an upper bound must lie above it.
MARGIN = 1e-4


def widened(upper: torch.Tensor) -> torch.Tensor:
    """Upper bounds on logits, raised by ``MARGIN (1 + |upper|)`` for rounding."""
    return upper + MARGIN * (1 + upper.abs())


def shares(
    estimated: torch.Tensor,
    variance: torch.Tensor,
    fixed_logits: torch.Tensor,
    value_norm: torch.Tensor,
    usable: torch.Tensor,
    group_score: str = "max",
) -> torch.Tensor:
    """``s_i = max over heads of exp(lhat_i + half the variance) / (D_fixed + sum exp lhat) * |v_i|``.

    Parameters
    ----------
    estimated, variance : torch.Tensor
        float64 ``[group, N]`` estimated logits and the variance of what the code misses.
    fixed_logits : torch.Tensor
        float64 ``[group, F]`` exact logits of sink and window.
    value_norm : torch.Tensor
        float64 ``[N]``; ones where the target or the sampler does not use it.
    usable : torch.Tensor
        bool ``[N]``; other tokens enter no sum.
    group_score : {"max", "mean"}
        How the group's heads share one score.

    Returns
    -------
    torch.Tensor
        float64 ``[N]``; 0 where not usable.
    """
    m = fixed_logits.max(-1, keepdim=True).values
    weights = (estimated + variance / 2 - m).clamp(max=MAX_EXPONENT).exp() * usable
    denominator = (fixed_logits - m).exp().sum(-1) + weights.sum(-1)
    share = weights / denominator[:, None]
    return (share.amax(0) if group_score == "max" else share.mean(0)) * value_norm


def ranks(
    share: torch.Tensor, usable: torch.Tensor, floor: float, low: int, key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with their floor, and the rank ``r_i = u_i / a_i``: token i is read at scale c when ``r_i < c``.

    Parameters
    ----------
    share : torch.Tensor
        float64 ``[N]`` from `shares`.
    usable : torch.Tensor
        bool ``[N]``; other tokens get score infinity and rank 0, so they are read for certain.
    floor : float
        Least score as a share of the mean.
    low : int
        Position of the first token of the range.
    key : int
        From `vattn_kernels.reference.rng.stream_key`.
    """
    scores = share.clamp(min=TINY) + floor * share.sum() / share.numel()
    u = rng.uniform(torch.arange(low, low + share.numel()), key)
    infinite = torch.full_like(scores, 1e30)
    return torch.where(usable, scores, infinite), torch.where(usable, u / scores, torch.zeros_like(u))
