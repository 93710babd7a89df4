"""One decode step, the long way: the same arguments as `vattn_kernels.ops.decode`."""

from __future__ import annotations

import math
from typing import Any

import torch

from vattn_kernels import pages
from vattn_kernels import params as layout
from vattn_kernels.quantiles import COARSE_SELECTORS, RANKING_SELECTORS
from vattn_kernels.reference import proportional, quest, rng, scores, signature, sketch, uniform
from vattn_kernels.reference.estimate import Head, shrunk

MOST_HALF_WIDTH = 1e3
ROUNDING = 1e-6
CERTIFIED, UNCERTIFIED, CAPPED, DENSE = range(4)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    codes: torch.Tensor | None,
    norms: torch.Tensor | None,
    valid: torch.Tensor | None,
    mean: torch.Tensor | None,
    query_basis: torch.Tensor | None,
    steps: torch.Tensor | None,
    fields: torch.Tensor | None,
    params: torch.Tensor,
    covered: torch.Tensor,
    *,
    sm_scale: float,
    layer_id: int,
    seed: int,
    sampler: str,
    target: str,
    selector: str,
    sink: int,
    window: int,
    dense_below: int,
    top_k_count: int,
    top_k_share: float,
    pilot: float,
    pilot_min: int,
    cap: float,
    floor: float,
    group_score: str = "max",
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and statistics of every request and head.

    Parameters
    ----------
    q, k_cache, v_cache, kv_indices, seq_lens, codes, norms, valid, mean, query_basis, steps, fields, params, covered
        As in `vattn_kernels.ops.decode`.
    sm_scale, layer_id, seed, sampler, target, selector, sink, window, dense_below, top_k_count, top_k_share, pilot, \
pilot_min, cap, floor, group_score
        Likewise.
    **unused
        Settings that do not change the estimate.

    Returns
    -------
    torch.Tensor
        float64 ``[batch, num_qo_heads, head_dim]``.
    torch.Tensor
        float64 ``[batch, num_qo_heads, 6]``, columns `vattn_kernels.ops.STATS`.
    """
    batch, num_qo_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_qo_heads // num_kv_heads
    out = torch.zeros(batch, num_qo_heads, head_dim, dtype=torch.float64)
    stats = torch.zeros(batch, num_qo_heads, 6, dtype=torch.float64)
    for request in range(batch):
        n = int(seq_lens[request])
        slots = kv_indices[request, :n].long()
        low, high = min(sink, n), max(min(sink, n), n - window)
        total = high - low
        for h in range(num_kv_heads):
            rows = slice(h * group, (h + 1) * group)
            queries = q[request, rows].double()
            keys, values = k_cache[slots, h].double(), v_cache[slots, h].double()
            logits = sm_scale * queries @ keys.T  # [G, n]
            if n < dense_below or n > int(covered) or total <= 2 * pilot_min:
                out[request, rows] = torch.softmax(logits, -1) @ values if n else 0
                stats[request, rows] = torch.tensor([1, 0, 0, DENSE, n, 0], dtype=torch.float64)
                continue
            fixed = torch.ones(n, dtype=torch.bool)
            fixed[low:high] = False
            upper, upper_norm = scores.widened(logits[:, low:high]), values[low:high].norm(dim=-1)
            inner = slots[low:high]
            usable = torch.ones(total, dtype=torch.bool)
            estimated, variance = logits[:, low:high], torch.zeros(group, total, dtype=torch.float64)
            value_norm = values[low:high].norm(dim=-1)
            if selector != "oracle":
                assert codes is not None and norms is not None and valid is not None
                assert mean is not None and steps is not None
                usable = valid[inner] != 0
                value_norm, upper_norm = sketch.norm_of(norms[inner, h, -1]), sketch.upper_norm(norms[inner, h, -1])
                if selector == "quest":
                    bounds = codes[inner // pages.PAGE, h]
                    estimated = quest.logits(queries, bounds, mean[h], steps[h], sm_scale)
                    upper = pages.upper_bound(queries, bounds.double(), sm_scale)
                else:
                    assert query_basis is not None and fields is not None
                    side = (codes[inner, h], norms[inner, h], mean[h])
                    if selector == "sketch":
                        tables = (query_basis[h], steps[h], fields[h])
                        estimated, variance = sketch.logits(queries, *side, *tables, sm_scale)
                        upper = sketch.upper_logits(queries, *side, *tables, sm_scale)
                    else:
                        tables = (query_basis[rows], steps[h], fields)
                        estimated = signature.logits(queries, *side, *tables, selector == "sign", sm_scale)
                        upper = torch.full_like(upper, math.inf)
                upper = torch.where(usable, scores.widened(upper), math.inf)
            provable = float(params[layout.LOG]) > 0
            heads = [
                Head(logits[g], values, fixed, *((upper[g], upper_norm) if provable else ())) for g in range(group)
            ]
            coarse = selector in COARSE_SELECTORS
            if target == "denominator" or sampler == "uniform" or coarse:
                value_norm = torch.ones_like(value_norm)
            valid_here, usable = usable, scores.usable_codes(usable, variance)
            share, log_mass = scores.shares(estimated, variance, logits[:, fixed], value_norm, usable)
            for head, estimated_mass in zip(heads, log_mass.tolist(), strict=True):
                # Coarse scores are no weights, so their sum is no mass.
                head.estimated_mass = -math.inf if coarse else estimated_mass
            # One scale for the group: its looks must not depend on the sample, or the score is not a head's own.
            if sampler == "uniform" or provable or group_score == "mean":
                share = scores.combined(share, group_score)
                usable = usable.all(0, keepdim=True)
            key = rng.stream_key(seed, layer_id, h, n)
            if sampler == "proportional":
                score, draws = scores.floored(share, usable, floor), rng.uniform(torch.arange(low, high), key)
                begin = max(pilot_min, math.ceil(pilot * total)) / max(float(share.amax(0).sum()), scores.TINY)
                ranks = selector in RANKING_SELECTORS
                drawn = proportional.sample(heads, score, draws, low, params, target, begin, cap, ranks)
            else:
                ranking = torch.where(valid_here, share[0], -1.0)
                size = uniform.top_k_size(top_k_count, top_k_share, total)
                drawn = uniform.sample(heads, ranking, size, low, key, params, target, pilot, pilot_min, cap)
            read = n - total + drawn.read.numel()
            slack = 1 + (ROUNDING if sampler == "uniform" else 0)
            for g, (estimate, width, cut) in enumerate(
                zip(drawn.estimates, drawn.half_widths, drawn.capped, strict=True)
            ):
                held = width <= float(params[0]) * slack
                if cut and not held and coarse and (sampler, target) == ("proportional", "output"):
                    estimate.out = shrunk(heads[g], estimate, drawn.read, drawn.weight)
                if sampler == "uniform":
                    outcome = CAPPED if cut else CERTIFIED if held else UNCERTIFIED
                else:
                    outcome = CERTIFIED if held else CAPPED if cut else UNCERTIFIED
                out[request, h * group + g] = estimate.out
                row = [read / n, drawn.budget, min(width, MOST_HALF_WIDTH), outcome, read, estimate.residual]
                stats[request, h * group + g] = torch.tensor(row, dtype=torch.float64)
    return out, stats
