"""Per-layer summary of the device counters, fit for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vattn_telemetry.counters import CounterLayout
from vattn_telemetry.metrics import ALL_LAYERS, OUTCOMES, READ_KINDS


def bucket_quantile(counts: Sequence[float], edges: Sequence[float], q: float) -> float | None:
    """Quantile of a histogram by linear interpolation within the bucket, as Prometheus computes it.

    Parameters
    ----------
    counts : sequence of float
        ``len(edges) + 1`` non-cumulative counts, the overflow last.
    edges : sequence of float
        Upper edges, ascending; the lower edge of the first bucket is 0.
    q : float
        In (0, 1).

    Returns
    -------
    float or None
        None without observations; the last edge if the quantile lies in the overflow, so a lower bound then.
    """
    if len(counts) != len(edges) + 1:
        raise ValueError(
            f"{len(counts)} counts for {len(edges)} edges, expected {len(edges) + 1}: pass the overflow too"
        )
    total = sum(counts)
    if total <= 0:
        return None
    rank = q * total
    seen = 0.0
    lower = 0.0
    for count, upper in zip(counts, edges, strict=False):
        if count > 0 and seen + count >= rank:
            return lower + (upper - lower) * (rank - seen) / count
        seen += count
        lower = upper
    return edges[-1]


def summarize_layers(layout: CounterLayout, values: torch.Tensor, first_layer: int = 0) -> list[dict[str, Any]]:
    """Summarize each layer.

    Parameters
    ----------
    layout : CounterLayout
    values : torch.Tensor
        ``[num_layers, width]``, float64, on the CPU.
    first_layer : int
        Index of the first row's layer in the whole model.

    Returns
    -------
    list of dict
        See `summarize_row`.
    """
    return [summarize_row(layout, row, first_layer + index) for index, row in enumerate(values.tolist())]


def summarize_total(layout: CounterLayout, values: torch.Tensor) -> dict[str, Any]:
    """Summarize all layers together; the label ``layer`` is ``"all"``.

    Parameters
    ----------
    layout : CounterLayout
    values : torch.Tensor
        ``[num_layers, width]``, float64, on the CPU.
    """
    return summarize_row(layout, values.sum(dim=0).tolist(), ALL_LAYERS)


def summarize_row(layout: CounterLayout, row: Sequence[float], layer: int | str) -> dict[str, Any]:
    """Summarize one row of counters.

    Returns
    -------
    dict
        ``layer``, ``density`` (tokens read / context tokens), ``context_tokens``, ``read`` and ``outcome`` (dicts by
        kind), ``certified_ratio`` (of the head-steps that were not dense), ``budget_mean`` (tokens), ``budget_p95``,
        ``error_mean``, ``error_p95`` (relative), ``audits``, ``audit_violations``, ``audit_error_mean``,
        ``audit_error_p95``. What had no observation is None.
    """
    read = dict(zip(READ_KINDS, (int(v) for v in row[layout.block("read")]), strict=True))
    outcome = dict(zip(OUTCOMES, (int(v) for v in row[layout.block("outcome")]), strict=True))
    context = int(row[layout.block("context")][0])
    estimated = sum(outcome.values()) - outcome["dense"]
    audits, violations = (int(v) for v in row[layout.block("audit")])
    summary: dict[str, Any] = {
        "layer": layer,
        "density": _ratio(sum(read.values()), context),
        "context_tokens": context,
        "read": read,
        "outcome": outcome,
        "certified_ratio": _ratio(outcome["certified"], estimated),
        "audits": audits,
        "audit_violations": violations,
    }
    for block, edges in (
        ("budget", layout.budget_edges),
        ("error", layout.error_edges),
        ("audit_error", layout.audit_error_edges),
    ):
        total, *counts = row[layout.block(block)]
        summary[f"{block}_mean"] = _ratio(total, sum(counts))
        summary[f"{block}_p95"] = bucket_quantile(counts, edges, 0.95)
    return summary


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
