from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE
from opentelemetry.sdk.metrics.export import MetricExportResult

from vattn_telemetry.collector import Collector
from vattn_telemetry.counters import CounterLayout
from vattn_telemetry.metrics import METRICS
from vattn_telemetry.otel import OtelExporter, otel_enabled
from vattn_telemetry.points import Point


@pytest.fixture
def receiver(monkeypatch):
    """OTLP/HTTP receiver on a free port; yields the list of requests it took."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            requests.append((self.path, ExportMetricsServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportMetricsServiceResponse().SerializeToString())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    yield requests
    server.shutdown()
    server.server_close()


def received(request):
    (resource,) = request.resource_metrics
    (scope,) = resource.scope_metrics
    attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
    return attributes, {metric.name: metric for metric in scope.metrics}


def attributes_of(point):
    return {a.key: a.value.string_value for a in point.attributes}


def test_counters_arrive_over_http_with_units_and_cumulative_values(receiver):
    layout = CounterLayout(1)
    counters = layout.allocate("cpu")
    collector = Collector(counters, layout, [OtelExporter({"model_name": "m"}, interval=3600)])
    error = counters[0, layout.block("error")]
    for _ in range(2):
        counters[0, layout.block("context")] += 50
        error[0] += 0.25
        error[2] += 5
        collector.flush()
    collector.set_gauge("epsilon", 0.05, layer="all")
    collector.stop()
    path, request = receiver[-1]
    attributes, metrics = received(request)
    assert path == "/v1/metrics"
    assert attributes["model_name"] == "m"
    assert attributes["service.name"] == "vattn-sgl"

    context = metrics["vattention.context.tokens"]
    assert context.unit == "{token}"
    assert context.sum.is_monotonic
    assert context.sum.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
    assert [(attributes_of(p), p.as_double) for p in context.sum.data_points] == [({"layer": "0"}, 100.0)]

    histogram = metrics["vattention.error.estimated"].histogram
    (point,) = histogram.data_points
    assert histogram.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
    assert tuple(point.explicit_bounds) == layout.error_edges
    assert list(point.bucket_counts) == [0, 10] + [0] * (len(layout.error_edges) - 1)
    assert (point.count, point.sum) == (10, 0.5)
    assert not point.HasField("min") and not point.HasField("max")

    (epsilon,) = metrics["vattention.epsilon"].gauge.data_points
    assert epsilon.as_double == 0.05


def test_every_metric_of_the_table_is_sent(receiver):
    exporter = OtelExporter(interval=3600)
    for metric in METRICS:
        labels = {label: metric.values.get(label, ("x",))[0] for label in metric.labels}
        exporter.export([Point(metric, labels, 1.0, (1,) * (len(metric.buckets) + 1) if metric.buckets else ())])
    exporter.close()
    _, metrics = received(receiver[-1][1])
    assert {(m.otel_name, m.unit, m.help) for m in METRICS} == {
        (m.name, m.unit, m.description) for m in metrics.values()
    }


def test_the_environment_names_the_service(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    OtelExporter(interval=3600).close()
    attributes, _ = received(receiver[-1][1])
    assert attributes["service.name"] == "chat"
    assert attributes["deployment.environment"] == "test"


def test_the_thread_sends_by_itself(receiver):
    exporter = OtelExporter(interval=0.01)
    arrived = threading.Event()
    send = exporter._exporter.export
    exporter._exporter.export = lambda data: (send(data), arrived.set())[0]
    assert arrived.wait(timeout=30)
    exporter.close()
    assert receiver


def test_failed_send_is_counted_and_loses_nothing():
    class Sender:
        sent: tuple = ()
        result = MetricExportResult.FAILURE

        def export(self, data):
            self.sent = (*self.sent, data)
            return self.result

        def shutdown(self):
            pass

    sender = Sender()
    exporter = OtelExporter(interval=3600, exporter=sender)
    layout = CounterLayout(1)
    counters = layout.allocate("cpu")
    collector = Collector(counters, layout, [exporter])
    counters[0, 0] = 3
    collector.flush()
    assert not exporter.send()
    sender.result = MetricExportResult.SUCCESS
    collector.flush()
    assert exporter.send()
    metrics = {m.name: m for m in sender.sent[-1].resource_metrics[0].scope_metrics[0].metrics}
    assert metrics["vattention.context.tokens"].data.data_points[0].value == 3
    dropped = {p.attributes["reason"]: p.value for p in metrics["vattention.telemetry.dropped"].data.data_points}
    assert dropped["otel"] == 1
    collector.stop()


@pytest.mark.parametrize(
    ("environment", "enabled"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://collector:4318/v1/metrics"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_METRICS_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_standard_variables_enable_it(environment, enabled):
    assert otel_enabled(environment) is enabled


def test_wrong_interval_is_explained(monkeypatch):
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "soon")
    with pytest.raises(ValueError, match="'soon', expected a positive number of milliseconds"):
        OtelExporter()
