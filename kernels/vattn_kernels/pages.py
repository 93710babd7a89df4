"""Page bounds of keys (Quest, arXiv 2406.10774): elementwise least and greatest key of a block of slots."""

from __future__ import annotations

import torch

PAGE = 16


def num_pages(num_slots: int) -> int:
    """Blocks that cover ``num_slots`` slots."""
    return -(-num_slots // PAGE)


def features(
    q: torch.Tensor, bounds: torch.Tensor, mean: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw score, unit and base of tokens from the bounds of their pages.

    Parameters
    ----------
    q : torch.Tensor
        ``[queries, head_dim]``.
    bounds : torch.Tensor
        ``[n, 2, head_dim]`` least and greatest key of each token's page.
    mean : torch.Tensor
        ``[head_dim]`` mean key of the head.
    sm_scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        ``[queries, n]`` logit of the page's middle, less the mean key's.
    torch.Tensor
        ``[queries, n]`` half the width of the page's logits; middle plus this is the upper bound.
    torch.Tensor
        ``[queries]`` logit of the mean key.
    """
    middle, half = (bounds[:, 0] + bounds[:, 1]) / 2, (bounds[:, 1] - bounds[:, 0]) / 2
    base = sm_scale * (q @ mean)
    return sm_scale * (q @ middle.T) - base[:, None], sm_scale * (q.abs() @ half.T), base


def upper_bound(q: torch.Tensor, bounds: torch.Tensor, sm_scale: float) -> torch.Tensor:
    """Provable: no key between the page's least and greatest has a larger logit (Quest, Section 3.3).

    Parameters
    ----------
    q, bounds, sm_scale
        As in `features`.

    Returns
    -------
    torch.Tensor
        ``[queries, n]``: ``sm_scale sum_d max(q_d least_d, q_d greatest_d)``.
    """
    positive, negative = q.clamp(min=0), q.clamp(max=0)
    return sm_scale * (positive @ bounds[:, 1].T + negative @ bounds[:, 0].T)


def sample_features(
    q: torch.Tensor, k: torch.Tensor, mean: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`features` of sampled keys, each run of 16 a page.

    Parameters
    ----------
    q : torch.Tensor
        ``[n, group, head_dim]``.
    k : torch.Tensor
        ``[m, head_dim]``, m a multiple of 16.
    mean, sm_scale
        As in `features`.

    Returns
    -------
    torch.Tensor, torch.Tensor, torch.Tensor
        ``[n * group, m]`` twice, ``[n * group]``.
    """
    blocks = k.unflatten(0, (-1, PAGE))
    bounds = torch.stack([blocks.amin(1), blocks.amax(1)], 1).repeat_interleave(PAGE, 0)
    return features(q.flatten(0, 1), bounds, mean, sm_scale)
