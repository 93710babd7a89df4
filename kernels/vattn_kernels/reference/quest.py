"""Page bounds of keys and the logits they give (selector ``quest``)."""

from __future__ import annotations

import torch

from vattn_kernels import line as lines
from vattn_kernels import pages
from vattn_kernels.reference.sketch import level


def encode_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    norms: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """As `vattn_kernels.ops.encode_pages`."""
    for slot in slots.tolist():
        norms[slot, :, 0] = torch.stack([level(v.double().norm()) for v in v_cache[slot]])
        valid[slot] = 1
    for page in {slot // pages.PAGE for slot in slots.tolist()}:
        members = torch.arange(page * pages.PAGE, min((page + 1) * pages.PAGE, valid.shape[0]))
        keys = k_cache[members[valid[members] != 0]]
        bounds[page, :, 0], bounds[page, :, 1] = keys.amin(0), keys.amax(0)


def logits(
    q: torch.Tensor, bounds: torch.Tensor, mean: torch.Tensor, line: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """Estimated logits of one KV head.

    Parameters
    ----------
    q : torch.Tensor
        float64 ``[group, head_dim]``.
    bounds : torch.Tensor
        ``[n, 2, head_dim]`` of the tokens' pages.
    mean, line : torch.Tensor
        One head of `vattn_kernels.line.LineTables`.
    sm_scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        float64 ``[group, n]``.
    """
    return lines.apply(line.double(), *pages.features(q, bounds.double(), mean.double(), sm_scale))
