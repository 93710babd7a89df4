"""Scores of the range: every head's estimated share of the output (or of the mass) by token."""

from __future__ import annotations

import torch

TINY = 1e-30
INFINITE = 1e30
MAX_EXPONENT = 60.0
# In nats, of half the variance of what a code misses. Beyond it a code says nothing of its token, whose estimated
# weight would outgrow all others: whitespace in program text has codes that miss by 100 nats.
MOST_HALF_VARIANCE = 8.0
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s_hi = exp(lhat_hi + half the variance) / Dhat_h * |v_i|``, ``Dhat_h`` the fixed set's mass and all ``exp``.

    Parameters
    ----------
    estimated, variance : torch.Tensor
        float64 ``[group, N]`` estimated logits and the variance of what the code misses.
    fixed_logits : torch.Tensor
        float64 ``[group, F]`` exact logits of sink and window.
    value_norm : torch.Tensor
        float64 ``[N]``; ones where the target or the sampler does not use it.
    usable : torch.Tensor
        bool ``[group, N]`` from `usable_codes`, or ``[N]``; other tokens enter no sum.

    Returns
    -------
    torch.Tensor
        float64 ``[group, N]``; 0 where not usable.
    torch.Tensor
        float64 ``[group]``, ``log Dhat_h``.
    """
    m = fixed_logits.max(-1, keepdim=True).values
    weights = (estimated + variance / 2 - m).clamp(max=MAX_EXPONENT).exp() * usable
    denominator = (fixed_logits - m).exp().sum(-1) + weights.sum(-1)
    return weights / denominator[:, None] * value_norm, m[:, 0] + denominator.log()


def usable_codes(valid: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Tokens of which a head's estimate says something, bool ``[group, N]``; ``proportional`` reads the others.

    Parameters
    ----------
    valid : torch.Tensor
        bool ``[N]``: the side data belong to the key.
    variance : torch.Tensor
        float64 ``[group, N]`` of what the code misses.
    """
    return valid & (variance / 2 <= MOST_HALF_VARIANCE)


def combined(share: torch.Tensor, group_score: str) -> torch.Tensor:
    """One score for the whole group, float64 ``[1, N]``.

    Parameters
    ----------
    share : torch.Tensor
        float64 ``[group, N]`` from `shares`.
    group_score : {"max", "mean"}
        How the heads are combined.
    """
    return share.amax(0, keepdim=True) if group_score == "max" else share.mean(0, keepdim=True)


def floored(share: torch.Tensor, usable: torch.Tensor, floor: float) -> torch.Tensor:
    """Scores with their floor: no token has probability 0.

    Parameters
    ----------
    share : torch.Tensor
        float64 ``[R, N]`` from `shares` or `combined`.
    usable : torch.Tensor
        bool ``[R, N]`` or ``[N]``; other tokens get `INFINITE`, so they are read for certain.
    floor : float
        Least score as a share of the row's mean.
    """
    scores = share + (floor * share.mean(-1, keepdim=True)).clamp(min=TINY)
    return torch.where(usable, scores, INFINITE)


def intensity(scores: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``t_i = max over rows r of c_r s_ri``: token i is read when ``u_i < t_i``, so ``pi_i = min(1, t_i)``.

    Parameters
    ----------
    scores : torch.Tensor
        float64 ``[R, N]`` from `floored`.
    scales : torch.Tensor
        float64 ``[R]``; where one grows the sample grows, and keeps all it had.
    """
    return (scales[:, None] * scores).amax(0)
