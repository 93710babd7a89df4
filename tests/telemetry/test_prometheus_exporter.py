from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from prometheus_client import CollectorRegistry

from vattn_telemetry.collector import Collector
from vattn_telemetry.counters import CounterLayout
from vattn_telemetry.metrics import METRICS, find
from vattn_telemetry.points import Point
from vattn_telemetry.prometheus import PrometheusExporter, add_to_histogram

LABELS = {"model_name": "m", "tp_rank": 0}


def sample(registry, name, **labels):
    return registry.get_sample_value(name, {"model_name": "m", "tp_rank": "0", **labels})


@pytest.fixture
def registry():
    return CollectorRegistry()


def test_collector_to_registry(registry):
    layout = CounterLayout(1)
    counters = layout.allocate("cpu")
    collector = Collector(counters, layout, [PrometheusExporter(LABELS, registry)])
    counters[0, layout.block("context")] = 200
    counters[0, layout.block("read").start + 3] = 30
    error = counters[0, layout.block("error")]
    error[0], error[1 + layout.error_edges.index(0.05)], error[-1] = 2.6, 12, 1
    collector.set_gauge("epsilon", 0.05, layer="all")
    collector.flush()
    collector.flush()
    assert sample(registry, "vattention_context_tokens_total", layer="0") == 200
    assert sample(registry, "vattention_read_tokens_total", layer="0", kind="sample") == 30
    assert sample(registry, "vattention_read_tokens_total", layer="0", kind="dense") == 0
    assert sample(registry, "vattention_epsilon", layer="all") == 0.05
    name = "vattention_estimated_relative_error"
    assert sample(registry, f"{name}_bucket", layer="0", le="0.04") == 0
    assert sample(registry, f"{name}_bucket", layer="0", le="0.05") == 12
    assert sample(registry, f"{name}_bucket", layer="0", le="1.0") == 12
    assert sample(registry, f"{name}_bucket", layer="0", le="+Inf") == 13
    assert sample(registry, f"{name}_count", layer="0") == 13
    assert sample(registry, f"{name}_sum", layer="0") == pytest.approx(2.6)


def test_every_metric_of_the_table_reaches_the_registry(registry):
    exporter = PrometheusExporter(LABELS, registry)
    for metric in METRICS:
        labels = {label: metric.values.get(label, ("x",))[0] for label in metric.labels}
        exporter.export([Point(metric, labels, 1.0, (1,) * (len(metric.buckets) + 1) if metric.buckets else ())])
    names = {s.name for family in registry.collect() for s in family.samples}
    assert {name for metric in METRICS for name in metric.series_names} <= names


def test_one_bad_point_does_not_lose_the_others(registry):
    exporter = PrometheusExporter(LABELS, registry)
    bad = Point(find("estimated_relative_error"), {"layer": "0"}, 1.0, (1, 2))
    good = Point(find("config_changes"), {"result": "applied"}, 1.0)
    with pytest.raises(ValueError, match="2 bucket counts"):
        exporter.export([bad, good])
    assert sample(registry, "vattention_config_changes_total", result="applied") == 1


def test_label_that_the_server_uses_too_is_refused(registry):
    with pytest.raises(ValueError, match="label layer is both the server's and the metric's"):
        PrometheusExporter({"layer": "x"}, registry)


def test_add_to_histogram_equals_observing_one_by_one():
    from prometheus_client import Histogram

    batch, single = CollectorRegistry(), CollectorRegistry()
    values, edges = [0.5, 1.0, 1.5, 9.0], (1.0, 2.0)
    add_to_histogram(Histogram("h", "h", buckets=edges, registry=batch), (2, 1, 1), sum(values))
    histogram = Histogram("h", "h", buckets=edges, registry=single)
    for value in values:
        histogram.observe(value)

    def samples(registry):
        return [(s.name, s.labels, s.value) for f in registry.collect() for s in f.samples if "created" not in s.name]

    assert samples(batch) == samples(single)


def test_importing_the_exporter_does_not_import_prometheus_client():
    code = (
        "import sys, vattn_telemetry.prometheus, vattn_telemetry.collector; print('prometheus_client' in sys.modules)"
    )
    assert _python(code) == "False"


def test_multiprocess_mode_as_sglang_uses_it(tmp_path):
    """Two writers set the directory after the import, as SGLang does; a third process serves /metrics."""
    writer = textwrap.dedent(
        """
        import os, sys
        from vattn_telemetry.collector import Collector
        from vattn_telemetry.counters import CounterLayout
        from vattn_telemetry.prometheus import PrometheusExporter
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
        layout = CounterLayout(1)
        counters = layout.allocate("cpu")
        collector = Collector(counters, layout, [PrometheusExporter({"tp_rank": sys.argv[2]})])
        for _ in range(2):
            counters[0, layout.block("context")] += 100
            error = counters[0, layout.block("error")]
            error[0] += 0.5
            error[3] += 4
            error[-1] += 1
            collector.flush()
        collector.set_gauge("epsilon", 0.05, layer="all")
        collector.flush()
        collector.set_gauge("epsilon", 0.2, layer="all")
        collector.stop()
        """
    )
    for rank in ("0", "1"):
        _python(writer, str(tmp_path), rank)
    reader = textwrap.dedent(
        """
        import json
        from prometheus_client import CollectorRegistry, multiprocess
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        print(json.dumps([[s.name, s.labels, s.value] for f in registry.collect() for s in f.samples]))
        """
    )
    samples = {
        (name, *sorted(labels.items())): value
        for name, labels, value in json.loads(_python(reader, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)))
    }
    layer = ("layer", "0")
    for rank in ("0", "1"):
        assert samples["vattention_context_tokens_total", layer, ("tp_rank", rank)] == 200
        assert samples["vattention_epsilon", ("layer", "all"), ("tp_rank", rank)] == 0.2
        name = "vattention_estimated_relative_error"
        assert samples[f"{name}_bucket", layer, ("le", "0.0025"), ("tp_rank", rank)] == 0
        assert samples[f"{name}_bucket", layer, ("le", "0.005"), ("tp_rank", rank)] == 8
        assert samples[f"{name}_bucket", layer, ("le", "+Inf"), ("tp_rank", rank)] == 10
        assert samples[f"{name}_count", layer, ("tp_rank", rank)] == 10
        assert samples[f"{name}_sum", layer, ("tp_rank", rank)] == pytest.approx(1.0)


def _python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
