"""Writes `docs/metrics.md` from the table: ``python -m vattn_telemetry.docs [PATH]``."""

from __future__ import annotations

import sys
from pathlib import Path

from vattn_telemetry.metrics import METRICS, Metric

_HEADER = """\
# Metrics

Generated from `telemetry/vattn_telemetry/metrics.py` by `python -m vattn_telemetry.docs`: edit the table, not this.

Served at the server's own `/metrics` (needs `--enable-metrics`), and over OTLP/HTTP where `OTEL_EXPORTER_OTLP_ENDPOINT`
is set. The server's labels (`model_name`, `engine_type`, `tp_rank`, `pp_rank`, ...) are added to every series in
Prometheus, and are attributes of the resource in OpenTelemetry.

A *head-step* is one query head of one request in one decode step. `layer` is the layer's index in the model; `"all"`
stands for the model's default.

Density: `sum(rate(vattention_read_tokens_total[5m])) / sum(rate(vattention_context_tokens_total[5m]))`.

| Prometheus | OpenTelemetry | type | unit | labels | meaning |
|---|---|---|---|---|---|
"""


def render() -> str:
    """Return the page as Markdown."""
    histograms = [metric for metric in METRICS if metric.buckets]
    buckets = "".join(f"- `{m.name}`: {', '.join(f'{edge:g}' for edge in m.buckets)}\n" for m in histograms)
    return f"{_HEADER}{''.join(_row(metric) for metric in METRICS)}\n## Upper edges of the buckets\n\n{buckets}"


def _row(metric: Metric) -> str:
    labels = "; ".join(
        f"`{label}` = {', '.join(metric.values[label])}" if label in metric.values else f"`{label}`"
        for label in metric.labels
    )
    return f"| `{metric.name}` | `{metric.otel_name}` | {metric.type} | `{metric.unit}` | {labels} | {metric.help} |\n"


def main(arguments: list[str]) -> None:
    """Write the page to the given path, or to `docs/metrics.md` of the checkout."""
    path = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
