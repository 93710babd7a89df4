"""Codes of keys and the scores they give (``algorithm.md``, "Sketch")."""

from __future__ import annotations

import math

import torch

from vattn_kernels.sketch import NORM_STEPS_PER_OCTAVE, NORM_ZERO

# With room for the rounding of the byte's own logarithm in float32.
HALF_STEP = 0.501
LAST_LEVEL = 255


def encode(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    mean: torch.Tensor,
    key_basis: torch.Tensor,
    steps: torch.Tensor,
    fields: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """As `vattn_kernels.ops.encode`, in float64."""
    for slot in slots.tolist():
        for head in range(k_cache.shape[1]):
            z = (k_cache[slot, head].double() - mean[head].double()) @ key_basis[head].double()
            words = [0] * codes.shape[-1]
            residual = z.clone()
            for d, (word, shift, width) in enumerate(fields[head].tolist()):
                if width == 0:
                    continue
                half, step = 1 << (width - 1), float(steps[head, d])
                code = min(max(int(torch.floor(z[d] / step)), -half), half - 1)
                residual[d] -= (code + 0.5) * step
                words[word] |= (code + half) << shift
            codes[slot, head] = torch.tensor([w - (1 << 32) if w >= 1 << 31 else w for w in words], dtype=torch.int32)
            norms[slot, head, 0] = level(residual.norm())
            norms[slot, head, 1] = level(v_cache[slot, head].double().norm())
        valid[slot] = 1


def level(norm: torch.Tensor) -> torch.Tensor:
    """Byte that stands for a norm, uint8."""
    steps = torch.round(NORM_STEPS_PER_OCTAVE * torch.log2(norm.clamp(min=1e-20)) + NORM_ZERO)
    return steps.clamp(0, 255).to(torch.uint8)


def norm_of(level: torch.Tensor) -> torch.Tensor:
    """Norm that a byte stands for, float64."""
    return torch.exp2((level.double() - NORM_ZERO) / NORM_STEPS_PER_OCTAVE)


def upper_norm(level: torch.Tensor) -> torch.Tensor:
    """Largest norm that rounds to a byte, float64: half a step above `norm_of`, and infinite at the last byte."""
    above = torch.exp2((level.double() + HALF_STEP - NORM_ZERO) / NORM_STEPS_PER_OCTAVE)
    return torch.where(level == LAST_LEVEL, math.inf, above)


def upper_logits(
    q: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    mean: torch.Tensor,
    query_basis: torch.Tensor,
    steps: torch.Tensor,
    fields: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """Provable upper bound on the logits, whatever the keys are.

    ``q . k = q . mean + t . z`` with ``t = L^-1 q``, and the code gives ``zhat``; by Cauchy-Schwarz
    ``t . z <= t . zhat + |t| |z - zhat|``, and the norm byte bounds the last factor (`upper_norm`).

    Parameters
    ----------
    q, codes, norms, mean, query_basis, steps, fields, sm_scale
        As in `logits`.

    Returns
    -------
    torch.Tensor
        float64 ``[group, n]``.
    """
    estimate, _ = logits(q, codes, norms, mean, query_basis, steps, fields, sm_scale)
    length = sm_scale * (q @ query_basis.double()).norm(dim=-1)
    return estimate + length[:, None] * upper_norm(norms[:, 0])


def logits(
    q: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    mean: torch.Tensor,
    query_basis: torch.Tensor,
    steps: torch.Tensor,
    fields: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimated logits of one KV head and the variance of what the code misses.

    Parameters
    ----------
    q : torch.Tensor
        float64 ``[group, head_dim]``.
    codes, norms : torch.Tensor
        ``[n, words]`` and ``[n, 2]`` of the tokens.
    mean, query_basis, steps, fields : torch.Tensor
        One head of `vattn_kernels.sketch.SketchTables`.
    sm_scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        ``sm_scale (q . mean + sum_d t_d zhat_d)``, float64 ``[group, n]``.
    torch.Tensor
        ``sm_scale^2 |L^-1 q|^2 / head_dim * err^2``, float64 ``[group, n]``.
    """
    t = q @ query_basis.double()
    estimate = (q @ mean.double())[:, None].repeat(1, codes.shape[0])
    for d, (word, shift, width) in enumerate(fields.tolist()):
        if width == 0:
            continue
        code = (codes[:, word].long() >> shift) & ((1 << width) - 1)
        zhat = (code.double() - (1 << (width - 1)) + 0.5) * float(steps[d])
        estimate += t[:, d, None] * zhat
    energy = t.square().sum(-1) / q.shape[-1]
    variance = sm_scale**2 * energy[:, None] * norm_of(norms[:, 0]).square()
    return sm_scale * estimate, variance
