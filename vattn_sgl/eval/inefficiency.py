"""How much a selector's scores cost: times the samples that exact scores need, for one variance."""

from __future__ import annotations

import torch

from vattn_kernels.quantiles import COARSE_SELECTORS
from vattn_sgl.config import Settings
from vattn_sgl.eval.capture import Captured, Geometry
from vattn_sgl.eval.methods import DEFAULTS
from vattn_sgl.eval.selectors import Adapter


def inefficiency(captured: Captured, geometry: Geometry, adapter: Adapter, chosen: torch.Tensor) -> torch.Tensor:
    """Variance of ``proportional`` with a selector's scores over that with exact ones, at equal expected sample.

    With ``a_i = y_i |v_i - o|`` and inclusion probabilities proportional to ``s_i`` the variance of a sample of m is
    ``sum(s) sum(a^2 / s) / m`` (target ``output``, few enough samples that none is certain), so the ratio does not
    depend on m. Scores are those of the sampler, of one query head: ``exp(lhat + variance / 2) |v|``, without the norm
    for a coarse selector, plus the floor. The exact ones have the norm and no floor.

    Parameters
    ----------
    captured : Captured
        The text.
    geometry : Geometry
        Of the model.
    adapter : Adapter
        Selector, attached to the text.
    chosen : torch.Tensor
        int64 ``[num_positions]`` indices into ``captured.positions``.

    Returns
    -------
    torch.Tensor
        float64 ``[num_layers, num_qo_heads, num_positions]``.
    """
    g = geometry
    result = torch.empty(g.num_layers, g.num_qo_heads, chosen.numel(), dtype=torch.float64)
    for layer in range(g.num_layers):
        for h in range(g.num_kv_heads):
            heads = slice(h * g.group, (h + 1) * g.group)
            for index, c in enumerate(chosen.tolist()):
                n = int(captured.positions[c]) + 1
                q = captured.q[layer, c, heads]
                slots, inner = torch.arange(n), slice(DEFAULTS.sink, n - DEFAULTS.window)
                values = captured.v[layer, :n, h].double()
                logits = g.sm_scale * q.double() @ captured.k[layer, :n, h].double().T
                weight = torch.softmax(logits, -1)
                deviation = (values[None] - (weight @ values)[:, None]).norm(dim=-1)  # [G, n]
                a = (weight * deviation)[:, inner]
                norm = values[inner].norm(dim=-1)
                estimated = adapter.logits(layer, h, q, slots)[:, inner]
                scores = torch.softmax(estimated, -1) * (1 if adapter.name in COARSE_SELECTORS else norm)
                ours = spread(scores, a, Settings.default_floor(adapter.name))
                exact = spread(torch.softmax(logits[:, inner], -1) * norm, a, 0.0)
                result[layer, heads, index] = ours / exact
    return result


def spread(scores: torch.Tensor, a: torch.Tensor, floor: float) -> torch.Tensor:
    """``sum(s) sum(a^2 / s)`` over the last axis, with the sampler's floor under the scores."""
    s = scores + floor * scores.mean(-1, keepdim=True)
    return s.sum(-1) * (a.square() / s).sum(-1)
