"""Ways to attend with part of a cache: the op with any of its settings, and baselines in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from vattn_kernels import ops, params, quantiles
from vattn_kernels.reference import rng
from vattn_sgl.config import Settings
from vattn_sgl.eval.capture import Captured, Geometry
from vattn_sgl.eval.selectors import Adapter
from vattn_sgl.selectors.base import UNLIMITED
from vattn_telemetry.counters import CounterLayout

DEFAULTS = Settings()
BASELINES = ("window", "random", "top_k")
OUT_OF_REACH = 1e-9


@dataclass(frozen=True)
class Method:
    """One way to attend.

    Attributes
    ----------
    sampler : str
        ``proportional`` or ``uniform`` (the op), or one of `BASELINES`.
    target, bound : str
        Of the op; empty for a baseline.
    epsilon : float
        Of the op; 0 for a baseline.
    delta : float
        Of the op.
    density : float
        Share of the context that is read whatever the error; 0 where epsilon decides.
    settings : tuple of (str, value)
        Overrides of `vattn_sgl.config.Settings`.
    """

    sampler: str = DEFAULTS.sampler
    target: str = DEFAULTS.target
    bound: str = DEFAULTS.effective_bound
    epsilon: float = DEFAULTS.epsilon
    delta: float = DEFAULTS.delta
    density: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def is_baseline(self) -> bool:
        """Whether plain torch computes it."""
        return self.sampler in BASELINES


def certified(sampler: str, target: str, epsilon: float, delta: float = 0.05, **settings: Any) -> Method:
    """The op with the default bound of its sampler and target."""
    bound = quantiles.default_bound(sampler, target)
    return Method(sampler, target, bound, epsilon, delta, settings=tuple(settings.items()))


def baseline(kind: str, density: float, **settings: Any) -> Method:
    """A baseline of fixed density."""
    return Method(kind, "", "", 0.0, 0.0, density, tuple(settings.items()))


def capped(sampler: str, target: str, density: float, **settings: Any) -> Method:
    """The op with an epsilon out of reach, so that every group reads what its cap leaves it."""
    bound = quantiles.default_bound(sampler, target)
    return Method(sampler, target, bound, OUT_OF_REACH, DEFAULTS.delta, density, tuple(settings.items()))


@dataclass
class Rows:
    """Queries of one layer and the tokens they see.

    Attributes
    ----------
    layer : int
        Layer.
    q : torch.Tensor
        float32 ``[batch, num_qo_heads, head_dim]``.
    kv_indices : torch.Tensor
        int32 ``[batch, longest]``.
    seq_lens : torch.Tensor
        int64 ``[batch]``.
    """

    layer: int
    q: torch.Tensor
    kv_indices: torch.Tensor
    seq_lens: torch.Tensor


@dataclass
class Attention:
    """Attends over a captured text by a method.

    Attributes
    ----------
    captured : Captured
        The text.
    geometry : Geometry
        Of the model.
    seed : int
        Of the samples.
    """

    captured: Captured
    geometry: Geometry
    seed: int = 0
    _layout: CounterLayout = field(default_factory=lambda: CounterLayout(1))

    def attend(self, method: Method, adapter: Adapter, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and statistics.

        Parameters
        ----------
        method : Method
            How.
        adapter : Adapter
            Selector, attached to the same text.
        rows : Rows
            Which queries.

        Returns
        -------
        torch.Tensor
            float32 ``[batch, num_qo_heads, head_dim]``.
        torch.Tensor
            float32 ``[batch, num_qo_heads, 6]``, columns `vattn_kernels.ops.STATS`; of a baseline only the density.
        """
        if method.is_baseline:
            return self._baseline(method, adapter, rows)
        settings = Settings(**({"floor": Settings.default_floor(adapter.name)} | dict(method.settings)))
        layer = rows.layer
        out = torch.empty_like(rows.q)
        stats = torch.empty(*rows.q.shape[:2], len(ops.STATS))
        ops.decode(
            rows.q.contiguous(),
            self.captured.k[layer],
            self.captured.v[layer],
            rows.kv_indices,
            rows.seq_lens,
            *adapter.arguments(layer),
            torch.tensor(params.pack(method.epsilon, method.delta, method.bound, adapter.dimensions[layer])),
            torch.tensor([UNLIMITED], dtype=torch.int32),
            *self._layout.edge_tensors("cpu"),
            out,
            stats,
            self._layout.allocate("cpu")[0],
            list(self._layout.offsets),
            sm_scale=self.geometry.sm_scale,
            layer_id=layer,
            seed=self.seed,
            sampler=method.sampler,
            target=method.target,
            selector=adapter.name,
            sink=settings.sink,
            window=settings.window,
            dense_below=0,
            **settings.top_k_arguments,
            pilot=settings.pilot,
            pilot_min=settings.pilot_min,
            cap=settings.cap,
            floor=settings.floor,
            audit_rate=0.0,
            group_score=settings.group_score,
        )
        return out, stats

    def _baseline(self, method: Method, adapter: Adapter, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        g, settings = self.geometry, dict(method.settings)
        sink, window = settings.get("sink", DEFAULTS.sink), settings.get("window", DEFAULTS.window)
        k, v = self.captured.k[rows.layer], self.captured.v[rows.layer]
        out = torch.empty_like(rows.q)
        stats = torch.zeros(*rows.q.shape[:2], len(ops.STATS))
        # What is selected lies before the window, and there every row sees the same tokens.
        shared = rows.kv_indices[rows.seq_lens.argmax()].long()
        for h in range(g.num_kv_heads):
            heads = slice(h * g.group, (h + 1) * g.group)
            if method.sampler == "top_k":
                queries = rows.q[:, heads].reshape(-1, g.head_dim)
                estimated = adapter.logits(rows.layer, h, queries, shared).unflatten(0, (-1, g.group))  # [B, G, n]
            for r, n in enumerate(rows.seq_lens.tolist()):
                size = min(max(0, round(method.density * n) - sink - window), n - sink - window)
                log_weight = torch.full((n,), -torch.inf)
                log_weight[:sink] = log_weight[n - window :] = 0
                inner = log_weight[sink : n - window]
                if method.sampler == "window":
                    inner[inner.numel() - size :] = 0
                elif method.sampler == "random":
                    drawn = rng.permutation(inner.numel(), rng.stream_key(self.seed, rows.layer, h, n))[:size]
                    inner[drawn] = math.log(inner.numel() / max(1, size))
                else:
                    share = torch.softmax(estimated[r, :, :n], -1).amax(0)[sink : n - window]
                    inner[share.topk(size).indices] = 0
                read = (log_weight > -torch.inf).nonzero()[:, 0]
                slots = rows.kv_indices[r, read].long()
                logits = g.sm_scale * rows.q[r, heads] @ k[slots, h].T + log_weight[read]
                out[r, heads] = torch.softmax(logits, -1) @ v[slots, h]
                stats[r, heads, 0] = read.numel() / n
        return out, stats


def causal_rows(captured: Captured, layer: int, chosen: torch.Tensor) -> Rows:
    """Captured queries, each over the tokens up to and with its own.

    Parameters
    ----------
    captured : Captured
        The text.
    layer : int
        Layer.
    chosen : torch.Tensor
        int64 ``[batch]`` indices into ``captured.positions``.
    """
    lengths = captured.positions[chosen] + 1
    slots = torch.arange(int(lengths.max()), dtype=torch.int32).repeat(chosen.numel(), 1)
    return Rows(layer, captured.q[layer, chosen], slots, lengths)


def exact(captured: Captured, geometry: Geometry, rows: Rows) -> torch.Tensor:
    """Dense attention in float64, ``[batch, num_qo_heads, head_dim]``."""
    out = torch.empty(rows.q.shape, dtype=torch.float64)
    for h in range(geometry.num_kv_heads):
        heads = slice(h * geometry.group, (h + 1) * geometry.group)
        longest = int(rows.seq_lens.max())
        keys, values = captured.k[rows.layer, :longest, h].double(), captured.v[rows.layer, :longest, h].double()
        logits = geometry.sm_scale * rows.q[:, heads].double() @ keys.T  # [B, G, n]
        logits.masked_fill_(torch.arange(longest) >= rows.seq_lens[:, None, None], -torch.inf)
        out[:, heads] = torch.softmax(logits, -1) @ values
    return out
