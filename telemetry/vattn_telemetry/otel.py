"""OpenTelemetry exporter: the table of metrics over OTLP/HTTP.

The SDK's instruments can only observe single values, so the aggregated counters become the SDK's data points directly
(cumulative sums, gauges and explicit-bucket histograms), which is what an SDK reader would have handed to its exporter.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from vattn_telemetry.metrics import METRICS, Metric
from vattn_telemetry.points import DropCallback, Point

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint, MetricExporter, MetricsData
    from opentelemetry.sdk.metrics.export import Metric as OtelMetric

_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_INTERVAL_VARIABLE = "OTEL_METRIC_EXPORT_INTERVAL"
_DEFAULT_INTERVAL_SECONDS = 60.0

Labels = tuple[tuple[str, str], ...]


def otel_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the standard variables ask for OTLP metrics.

    True when ``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_METRICS_ENDPOINT`` is set, unless
    ``OTEL_SDK_DISABLED`` is ``true`` or ``OTEL_METRICS_EXPORTER`` is ``none``.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_METRICS_EXPORTER", "") == "none":
        return False
    return any(environ.get(name) for name in _ENDPOINT_VARIABLES)


class OtelExporter:
    """Accumulates points and sends them over OTLP/HTTP from a thread of its own.

    Endpoint, headers, time-out and interval come from the standard ``OTEL_EXPORTER_OTLP_*`` and
    ``OTEL_METRIC_EXPORT_INTERVAL`` variables.

    Parameters
    ----------
    resource_attributes : mapping of str to object
        Attributes of the resource beside those of ``OTEL_RESOURCE_ATTRIBUTES``, for example the server's labels.
    interval : float, optional
        Seconds between two exports.
    exporter : opentelemetry.sdk.metrics.export.MetricExporter, optional
        Sends the data; OTLP/HTTP if None.

    Raises
    ------
    ImportError
        If opentelemetry-sdk or opentelemetry-exporter-otlp-proto-http is not installed.
    ValueError
        If ``OTEL_METRIC_EXPORT_INTERVAL`` is no positive number of milliseconds.
    """

    name = "otel"

    def __init__(
        self,
        resource_attributes: Mapping[str, object] | None = None,
        *,
        interval: float | None = None,
        exporter: MetricExporter | None = None,
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.sdk.resources import Resource
        except ImportError as error:
            raise ImportError(
                "metrics over OTLP need opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http: install both, "
                "or unset OTEL_EXPORTER_OTLP_ENDPOINT"
            ) from error
        attributes = {name: str(value) for name, value in (resource_attributes or {}).items()}
        if not _service_is_named():
            attributes.setdefault("service.name", "vattn-sgl")
        self._resource = Resource.create(attributes)
        self._exporter = OTLPMetricExporter() if exporter is None else exporter
        self._interval = _interval_from_environment() if interval is None else interval
        self._start_ns = time.time_ns()
        self._values: dict[str, dict[Labels, float]] = {metric.key: {} for metric in METRICS}
        self._counts: dict[str, dict[Labels, list[int]]] = {metric.key: {} for metric in METRICS}
        self._lock = threading.Lock()
        self._on_drop: DropCallback | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vattn-otel", daemon=True)
        self._thread.start()

    def attach(self, on_drop: DropCallback) -> None:
        """Receive the callback for failed sends."""
        self._on_drop = on_drop

    def export(self, points: Sequence[Point]) -> None:
        """Add the points to what the next send carries."""
        with self._lock:
            for point in points:
                labels = tuple(sorted(point.labels.items()))
                values = self._values[point.metric.key]
                if point.metric.type == "gauge":
                    values[labels] = point.value
                    continue
                values[labels] = values.get(labels, 0.0) + point.value
                if point.metric.type == "histogram":
                    counts = self._counts[point.metric.key].setdefault(labels, [0] * len(point.bucket_counts))
                    for index, count in enumerate(point.bucket_counts):
                        counts[index] += count

    def close(self) -> None:
        """Stop the thread, send once more and shut the sender down."""
        self._closed.set()
        self._thread.join(timeout=10.0)
        self.send()
        self._exporter.shutdown()

    def send(self) -> bool:
        """Send what has accumulated; a failure goes to the callback and loses nothing, for values are cumulative."""
        from opentelemetry.sdk.metrics.export import MetricExportResult

        failure: Exception | None = None
        try:
            if self._exporter.export(self._metrics_data()) is MetricExportResult.SUCCESS:
                return True
        except Exception as error:
            failure = error
        if self._on_drop is not None:
            self._on_drop(self.name, failure or RuntimeError("the OTLP endpoint did not take the metrics"))
        return False

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self.send()

    def _metrics_data(self) -> MetricsData:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        now_ns = time.time_ns()
        with self._lock:
            metrics = [self._otel_metric(metric, now_ns) for metric in METRICS if self._values[metric.key]]
        scope = ScopeMetrics(InstrumentationScope("vattn_telemetry"), metrics, "")
        return MetricsData([ResourceMetrics(self._resource, [scope], "")])

    def _otel_metric(self, metric: Metric, now_ns: int) -> OtelMetric:
        from opentelemetry.sdk.metrics import export as sdk

        data: sdk.Sum | sdk.Gauge | sdk.Histogram
        cumulative = sdk.AggregationTemporality.CUMULATIVE
        values = self._values[metric.key]
        if metric.type == "histogram":
            data = sdk.Histogram([self._histogram_point(metric, labels, now_ns) for labels in values], cumulative)
        else:
            numbers = [sdk.NumberDataPoint(dict(labels), self._start_ns, now_ns, v) for labels, v in values.items()]
            data = sdk.Gauge(numbers) if metric.type == "gauge" else sdk.Sum(numbers, cumulative, is_monotonic=True)
        return sdk.Metric(metric.otel_name, metric.help, metric.unit, data)

    def _histogram_point(self, metric: Metric, labels: Labels, now_ns: int) -> HistogramDataPoint:
        from opentelemetry.sdk.metrics import export as sdk

        counts = self._counts[metric.key][labels]
        # Buckets do not tell the extremes; None leaves these two optional fields out of the message.
        unknown = cast(float, None)
        return sdk.HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=self._start_ns,
            time_unix_nano=now_ns,
            count=sum(counts),
            sum=self._values[metric.key][labels],
            bucket_counts=list(counts),
            explicit_bounds=list(metric.buckets),
            min=unknown,
            max=unknown,
        )


def _service_is_named() -> bool:
    # Attributes given in code outrank the environment's, so a default must not be given over it.
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )


def _interval_from_environment() -> float:
    text = os.environ.get(_INTERVAL_VARIABLE, "")
    if not text:
        return _DEFAULT_INTERVAL_SECONDS
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = 0.0
    if milliseconds <= 0:
        raise ValueError(
            f"{_INTERVAL_VARIABLE} is {text!r}, expected a positive number of milliseconds, for example 10000"
        )
    return milliseconds / 1000.0
