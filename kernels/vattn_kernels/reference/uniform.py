"""The paper's sampler: top-k read for certain, and a uniform sample without replacement of the rest."""

from __future__ import annotations

import math

import torch

from vattn_kernels.reference import budget, rng
from vattn_kernels.reference.estimate import Head, estimate
from vattn_kernels.reference.proportional import Sample


def top_k_size(count: int, share: float, total: int) -> int:
    """Tokens of the top-k: a count, or with ``count`` -1 a share of the range."""
    return min(total, count if count >= 0 else math.ceil(share * total))


def sample(
    heads: list[Head],
    shares: torch.Tensor,
    top_k: int,
    low: int,
    key: int,
    row: torch.Tensor,
    target: str,
    pilot: float,
    pilot_min: int,
    cap: float,
) -> Sample:
    """Pilot of the first ``b0`` images of a keyed permutation, then the first ``b`` (nested).

    The population value of a top-k member is 0 (ours), so that the pilot's moments are those of the rest.

    Parameters
    ----------
    heads : list of Head
        The group.
    shares : torch.Tensor
        float64 ``[N]`` scores.
    top_k : int
        Tokens read for certain.
    low, key, row, target, pilot, pilot_min, cap
        As in `vattn_kernels.reference.proportional.sample`.
    """
    epsilon, total = float(row[0]), shares.numel()
    members = torch.sort(shares, descending=True, stable=True).indices[:top_k]
    is_member = torch.zeros(total, dtype=torch.bool)
    is_member[members] = True
    order = rng.permutation(total, key)
    first = min(total, max(pilot_min, math.ceil(pilot * total)))
    most = max(first, math.floor(cap * total))
    size, cut = first, [False] * len(heads)
    for final in (False, True):
        drawn = order[:size]
        drawn = drawn[~is_member[drawn]]
        read = torch.cat([members, drawn])
        weight = torch.cat([torch.ones(top_k), torch.full((drawn.numel(),), total / size)]).double()
        estimates = [estimate(head, read + low, weight, target) for head in heads]
        half_widths, wanted = [], size
        z = budget.quantile(row, size - 1)
        for index, (head, e) in enumerate(zip(heads, estimates, strict=True)):
            mass = e.mass[top_k:]
            gap = head.values[drawn + low] - e.out if target == "output" else torch.ones(drawn.numel(), 1).double()
            mean_square = float((mass[:, None] * gap).sum(0).square().sum()) / size
            sigma = math.sqrt(max(0.0, (float(e.deviation2[top_k:].sum()) - mean_square) / (size - 1)))
            half_widths.append(z * total * sigma * math.sqrt(max(0.0, 1 / size - 1 / total)) / e.unit)
            if not final:
                needed = max(first, math.ceil(budget.sample_size(sigma, epsilon * e.unit, z, total)))
                cut[index] = needed > most
                wanted = max(wanted, min(needed, most))
        if wanted == size:
            break
        size = wanted
    return Sample(read + low, estimates, half_widths, cut, size)
