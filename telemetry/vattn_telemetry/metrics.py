"""THE table of metrics: the only place that names one.

The exporters, the device counter layout, `docs/metrics.md`, the dashboard and the alert rules are made from this
table or tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

MetricType = Literal["counter", "gauge", "histogram"]

PROMETHEUS_PREFIX: Final = "vattention_"
OTEL_PREFIX: Final = "vattention."

READ_KINDS: Final = ("sink", "window", "top_k", "sample", "dense")
OUTCOMES: Final = ("certified", "uncertified", "capped", "dense")
ALL_LAYERS: Final = "all"

BUDGET_BUCKETS: Final = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0)
# Finest around the default epsilon of 0.05 and exact at the values an operator would choose.
ERROR_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes
    ----------
    key : str
        Name without prefix and without the counter's ``_total``, for example ``"context_tokens"``.
    type : {"counter", "gauge", "histogram"}
    unit : str
        UCUM unit, ``"1"`` for ratios and ``"{...}"`` for counts of things.
    otel_name : str
        Name of the OpenTelemetry instrument.
    help : str
        One sentence for people.
    labels : tuple of str
        Labels beside those that the server adds to every metric.
    values : mapping of str to tuple of str
        Allowed values of the labels that have a closed set.
    buckets : tuple of float
        Upper edges of a histogram, ascending, without the overflow; empty for other types.
    """

    key: str
    type: MetricType
    unit: str
    otel_name: str
    help: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    buckets: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Name of the metric in Prometheus, with ``_total`` on counters."""
        return f"{PROMETHEUS_PREFIX}{self.key}{'_total' if self.type == 'counter' else ''}"

    @property
    def series_names(self) -> tuple[str, ...]:
        """Every name under which Prometheus stores samples of this metric."""
        if self.type == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)

    def check_labels(self, labels: Mapping[str, str]) -> None:
        """Check a label set against the row.

        Raises
        ------
        ValueError
            If a label is missing, unknown, or has a value outside its closed set.
        """
        if set(labels) != set(self.labels):
            raise ValueError(
                f"{self.name}: labels are {sorted(labels)}, expected {sorted(self.labels)}; "
                "pass exactly the labels that vattn_telemetry/metrics.py lists"
            )
        for label, allowed in self.values.items():
            if labels[label] not in allowed:
                raise ValueError(
                    f"{self.name}: label {label}={labels[label]!r} is not one of {', '.join(allowed)}; "
                    "pass one of these, or add the value to vattn_telemetry/metrics.py"
                )


def _metric(
    key: str,
    type: MetricType,
    unit: str,
    otel: str,
    help: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = (),
    **values: tuple[str, ...],
) -> Metric:
    return Metric(key, type, unit, OTEL_PREFIX + otel, help, labels, MappingProxyType(values), buckets)


CONTEXT_TOKENS: Final = _metric(
    "context_tokens",
    "counter",
    "{token}",
    "context.tokens",
    "Tokens in the caches of the head-steps served (a head-step is one query head of one request in one decode step).",
    ("layer",),
)
READ_TOKENS: Final = _metric(
    "read_tokens",
    "counter",
    "{token}",
    "read.tokens",
    "Tokens whose K and V were read, per query head; its rate over that of vattention_context_tokens_total is density.",
    ("layer", "kind"),
    kind=READ_KINDS,
)
HEAD_STEPS: Final = _metric(
    "head_steps",
    "counter",
    "{head_step}",
    "head_steps",
    "Head-steps by how they ended: the bound holds, does not hold, was cut by the cap, or attention was dense.",
    ("layer", "outcome"),
    outcome=OUTCOMES,
)
SAMPLE_BUDGET: Final = _metric(
    "sample_budget_tokens",
    "histogram",
    "{token}",
    "sample.budget",
    "Adaptive budget: tokens that the sampler drew in one head-step that was not dense.",
    ("layer",),
    BUDGET_BUCKETS,
)
ESTIMATED_ERROR: Final = _metric(
    "estimated_relative_error",
    "histogram",
    "1",
    "error.estimated",
    "Half-width of the estimate at confidence 1 - delta, relative to the estimate, per head-step that was not dense.",
    ("layer",),
    ERROR_BUCKETS,
)
AUDIT_ERROR: Final = _metric(
    "audit_relative_error",
    "histogram",
    "1",
    "error.audited",
    "True relative error against dense attention, per audited head-step.",
    ("layer",),
    ERROR_BUCKETS,
)
AUDITS: Final = _metric(
    "audits", "counter", "{head_step}", "audits", "Head-steps compared with dense attention.", ("layer",)
)
AUDIT_VIOLATIONS: Final = _metric(
    "audit_violations",
    "counter",
    "{head_step}",
    "audit.violations",
    "Audited head-steps whose true error exceeded epsilon; their share of the audits must stay at or below delta.",
    ("layer",),
)
EPSILON: Final = _metric(
    "epsilon",
    "gauge",
    "1",
    "epsilon",
    'Bound on the relative error in force; layer="all" is the default, a layer appears only where it is overridden.',
    ("layer",),
)
DELTA: Final = _metric(
    "delta",
    "gauge",
    "1",
    "delta",
    'Probability with which the bound may fail; layer="all" is the default, a layer appears only where overridden.',
    ("layer",),
)
CONFIG_GENERATION: Final = _metric(
    "config_generation",
    "gauge",
    "{generation}",
    "config.generation",
    "Generation of the runtime settings in force; equal on every rank and replica once a change has arrived.",
)
CONFIG_CHANGES: Final = _metric(
    "config_changes",
    "counter",
    "{change}",
    "config.changes",
    "Requests to change the runtime settings.",
    ("result",),
    result=("applied", "rejected"),
)
SIDE_DATA: Final = _metric("side_data_bytes", "gauge", "By", "side_data.size", "Memory that the selector's data takes.")
CALIBRATED_POSITIONS: Final = _metric(
    "calibrated_positions",
    "gauge",
    "{token}",
    "calibrated.positions",
    "Longest position that the sketch calibration covers; 0 means not calibrated yet and served dense.",
)
TELEMETRY_DROPPED: Final = _metric(
    "telemetry_dropped",
    "counter",
    "{export}",
    "telemetry.dropped",
    "Reads of the device counters that were skipped (copy_pending, caught up by the next read) or failed (read_error), "
    "and exports that failed (prometheus, otel, exporter).",
    ("reason",),
    reason=("copy_pending", "read_error", "prometheus", "otel", "exporter"),
)
BUILD_INFO: Final = _metric(
    "build_info",
    "gauge",
    "1",
    "build_info",
    "Always 1; the labels say what runs.",
    ("version", "sglang_version", "selector", "target", "bound"),
)

METRICS: Final[tuple[Metric, ...]] = (
    CONTEXT_TOKENS,
    READ_TOKENS,
    HEAD_STEPS,
    SAMPLE_BUDGET,
    ESTIMATED_ERROR,
    AUDIT_ERROR,
    AUDITS,
    AUDIT_VIOLATIONS,
    EPSILON,
    DELTA,
    CONFIG_GENERATION,
    CONFIG_CHANGES,
    SIDE_DATA,
    CALIBRATED_POSITIONS,
    TELEMETRY_DROPPED,
    BUILD_INFO,
)

_BY_NAME: Final = {alias: metric for metric in METRICS for alias in (metric.key, metric.name)}


def find(name: str) -> Metric:
    """Look a metric up by its key or by its Prometheus name.

    Parameters
    ----------
    name : str
        For example ``"epsilon"``, ``"context_tokens"`` or ``"vattention_context_tokens_total"``.

    Raises
    ------
    KeyError
        If the table has no such metric.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        known = ", ".join(metric.key for metric in METRICS)
        raise KeyError(f"no metric {name!r} in vattn_telemetry/metrics.py; it has: {known}") from None
