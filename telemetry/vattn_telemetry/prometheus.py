"""Prometheus exporter: the table of metrics on prometheus_client's default registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vattn_telemetry.metrics import METRICS, Metric
from vattn_telemetry.points import DropCallback, Point

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class PrometheusExporter:
    """Exports points through prometheus_client, in its normal and in its multiprocess mode.

    prometheus_client is imported here and not with the module: it fixes its mode at import, and SGLang sets
    ``PROMETHEUS_MULTIPROC_DIR`` only after plugins were loaded.

    Parameters
    ----------
    labels : mapping of str to object
        Labels that every series gets, for example SGLang's ``model_name`` and ``tp_rank``.
    registry : prometheus_client.CollectorRegistry, optional
        The default registry if None. A registry takes the table once; a second exporter on it raises.

    Raises
    ------
    ValueError
        If a label of the table is among `labels`, or the registry holds the table already.
    """

    name = "prometheus"

    def __init__(self, labels: Mapping[str, object] | None = None, registry: CollectorRegistry | None = None) -> None:
        import prometheus_client

        self._labels = {name: str(value) for name, value in (labels or {}).items()}
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        self._families: dict[str, Any] = {}
        self._children: dict[tuple[str, tuple[str, ...]], Any] = {}
        for metric in METRICS:
            self._families[metric.key] = self._declare(metric)

    def attach(self, on_drop: DropCallback) -> None:
        """Nothing fails outside `export`."""

    def export(self, points: Sequence[Point]) -> None:
        """Apply the points to the registry.

        Raises
        ------
        Exception
            The first failure, after all other points were applied.
        """
        failure: Exception | None = None
        for point in points:
            try:
                self._apply(point)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Leave the registry as it is: the server's last scrape may still come."""

    def _declare(self, metric: Metric) -> Any:
        import prometheus_client

        clash = set(metric.labels) & set(self._labels)
        if clash:
            raise ValueError(
                f"{metric.name}: label {', '.join(sorted(clash))} is both the server's and the metric's; "
                "rename the server's (--extra-metric-labels)"
            )
        names = [*self._labels, *metric.labels]
        if metric.type == "counter":
            return prometheus_client.Counter(metric.name, metric.help, names, registry=self._registry)
        if metric.type == "gauge":
            return prometheus_client.Gauge(
                metric.name, metric.help, names, registry=self._registry, multiprocess_mode="mostrecent"
            )
        return prometheus_client.Histogram(
            metric.name, metric.help, names, registry=self._registry, buckets=metric.buckets
        )

    def _apply(self, point: Point) -> None:
        child = self._child(point)
        if point.metric.type == "counter":
            child.inc(point.value)
        elif point.metric.type == "gauge":
            child.set(point.value)
        else:
            add_to_histogram(child, point.bucket_counts, point.value)

    def _child(self, point: Point) -> Any:
        own = tuple(point.labels[label] for label in point.metric.labels)
        key = (point.metric.key, own)
        child = self._children.get(key)
        if child is None:
            child = self._families[point.metric.key].labels(*self._labels.values(), *own)
            self._children[key] = child
        return child


def add_to_histogram(child: Any, bucket_counts: Sequence[int], total: float) -> None:
    """Add an aggregated batch of observations to a prometheus_client histogram.

    The library has no public way to observe `n` values at once, so this is the one place that touches its fields; they
    are the same in normal and in multiprocess mode.

    Parameters
    ----------
    child : prometheus_client.Histogram
        With its labels applied.
    bucket_counts : sequence of int
        Non-cumulative counts, the overflow last.
    total : float
        Sum of the observed values.

    Raises
    ------
    ValueError
        If the number of buckets differs.
    """
    if len(bucket_counts) != len(child._buckets):
        raise ValueError(
            f"{len(bucket_counts)} bucket counts for {len(child._buckets)} buckets: "
            "pass one per edge of the metric and one for the overflow"
        )
    for bucket, count in zip(child._buckets, bucket_counts, strict=True):
        if count:
            bucket.inc(count)
    child._sum.inc(total)
