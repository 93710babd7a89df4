from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
import torch

from vattn_telemetry.collector import Collector
from vattn_telemetry.counters import CounterLayout


class Recorder:
    """Exporter that sums what it gets."""

    name = "exporter"

    def __init__(self, fail: bool = False) -> None:
        self.values: dict[tuple, float] = {}
        self.buckets: dict[tuple, list[int]] = {}
        self.fail = fail
        self.closed = False
        self.seen = threading.Event()

    def attach(self, on_drop):
        self.on_drop = on_drop

    def export(self, points):
        if self.fail:
            raise OSError("disk full")
        for point in points:
            key = (point.metric.key, *(point.labels[label] for label in point.metric.labels))
            if point.metric.type == "gauge":
                self.values[key] = point.value
            else:
                self.values[key] = self.values.get(key, 0) + point.value
            if point.bucket_counts:
                old = self.buckets.setdefault(key, [0] * len(point.bucket_counts))
                self.buckets[key] = [a + b for a, b in zip(old, point.bucket_counts, strict=True)]
        self.seen.set()

    def close(self):
        self.closed = True


@pytest.fixture
def layout():
    return CounterLayout(2)


@pytest.fixture
def counters(layout):
    return layout.allocate("cpu")


def test_flush_exports_deltas_of_monotone_counters(layout, counters):
    recorder = Recorder()
    collector = Collector(counters, layout, [recorder], first_layer=4)
    for _ in range(3):
        counters[1, layout.block("context")] += 100
        counters[1, layout.block("read").start + 2] += 7
        counters[1, layout.block("outcome").start] += 9
        counters[1, layout.block("budget").start] += 64
        counters[1, layout.block("budget").start + 1] += 2
        counters[1, layout.block("audit").start + 1] += 1
        assert collector.flush()
    assert recorder.values["context_tokens", "5"] == 300
    assert recorder.values["read_tokens", "5", "top_k"] == 21
    assert recorder.values["head_steps", "5", "certified"] == 27
    assert recorder.values["audit_violations", "5"] == 3
    assert recorder.values["sample_budget_tokens", "5"] == 192
    assert recorder.buckets["sample_budget_tokens", "5"][0] == 6
    assert recorder.values["context_tokens", "4"] == 0


def test_every_series_is_declared_at_zero_before_it_grows(layout, counters):
    recorder = Recorder()
    Collector(counters, layout, [recorder]).flush()
    keys = {key[0] for key in recorder.values}
    assert keys >= {"context_tokens", "read_tokens", "head_steps", "audits", "config_changes", "telemetry_dropped"}
    assert recorder.buckets["estimated_relative_error", "1"] == [0] * (len(layout.error_edges) + 1)
    assert not any(recorder.values.values())


def test_counters_are_never_written(layout, counters):
    counters += 3
    before = counters.clone()
    collector = Collector(counters, layout, [Recorder()])
    collector.flush()
    collector.flush()
    assert torch.equal(counters, before)


def test_counters_zeroed_by_their_owner_do_not_go_backwards(layout, counters):
    recorder = Recorder()
    collector = Collector(counters, layout, [recorder])
    counters[0, 0] = 100
    collector.flush()
    counters[0, 0] = 30
    collector.flush()
    assert recorder.values["context_tokens", "0"] == 130


def test_a_sum_that_is_not_finite_does_not_poison_the_series(layout, counters):
    recorder = Recorder()
    collector = Collector(counters, layout, [recorder])
    counters[0, layout.block("error").start] = float("inf")
    collector.flush()
    assert recorder.values["estimated_relative_error", "0"] == 0


def test_gauges_and_host_counters(layout, counters):
    recorder = Recorder()
    collector = Collector(counters, layout, [recorder])
    collector.set_gauge("epsilon", 0.05, layer="all")
    collector.set_gauge("vattention_epsilon", 0.2, layer="all")
    collector.add("config_changes", 2, result="applied")
    collector.add("vattention_config_changes_total", result="applied")
    collector.flush()
    assert recorder.values["epsilon", "all"] == 0.2
    assert recorder.values["config_changes", "applied"] == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.set_gauge("epsilno", 1, layer="all"), KeyError, "epsilno"),
        (lambda c: c.set_gauge("audits", 1, layer="0"), ValueError, "is a counter, expected a gauge"),
        (lambda c: c.set_gauge("epsilon", 1), ValueError, "expected \\['layer'\\]"),
        (lambda c: c.add("config_changes", -1, result="applied"), ValueError, "counters only grow"),
        (lambda c: c.add("config_changes", 1, result="maybe"), ValueError, "applied, rejected"),
    ],
)
def test_wrong_host_metrics_are_refused(layout, counters, call, error, message):
    with pytest.raises(error, match=message):
        call(Collector(counters, layout))


def test_failing_exporter_is_counted_logged_once_and_does_not_stop_the_others(layout, counters, caplog):
    broken, recorder = Recorder(fail=True), Recorder()
    collector = Collector(counters, layout, [broken, recorder])
    with caplog.at_level(logging.WARNING, logger="vattn_telemetry"):
        for _ in range(3):
            counters[0, 0] += 1
            collector.flush()
    collector.flush()
    assert recorder.values["context_tokens", "0"] == 3
    assert recorder.values["telemetry_dropped", "exporter"] == 3
    assert len([record for record in caplog.records if "disk full" in str(record.exc_info)]) == 1


def test_pending_copy_is_counted_and_caught_up(layout, counters):
    class SlowReader:
        ready = False

        def request(self):
            pass

        def take(self):
            return counters.clone() if self.ready else None

    recorder = Recorder()
    collector = Collector(counters, layout, [recorder])
    reader = SlowReader()
    collector._reader = reader
    counters[0, 0] = 5
    assert not collector.flush(timeout=0.01)
    reader.ready = True
    assert collector.flush()
    assert recorder.values["context_tokens", "0"] == 5
    assert recorder.values["telemetry_dropped", "copy_pending"] == 1


def test_failing_read_never_reaches_the_caller(layout, counters):
    class BrokenReader:
        def request(self):
            raise RuntimeError("device lost")

        def take(self):
            return None

    recorder = Recorder()
    collector = Collector(counters, layout, [recorder])
    working, collector._reader = collector._reader, BrokenReader()
    assert not collector.flush()
    collector._reader = working
    collector.flush()
    assert recorder.values["telemetry_dropped", "read_error"] == 1


def test_thread_exports_by_itself_and_stop_flushes_and_closes(layout, counters):
    recorder = Recorder()
    collector = Collector(counters, layout, [recorder], interval=0.01)
    others = set(threading.enumerate())
    collector.start()
    collector.start()
    (thread,) = set(threading.enumerate()) - others
    assert recorder.seen.wait(timeout=30)
    counters[0, 0] = 42
    collector.stop()
    assert recorder.values["context_tokens", "0"] == 42
    assert recorder.closed
    assert not thread.is_alive()


def test_nothing_is_read_while_paused(layout, counters):
    recorder = Recorder()
    collector = Collector(counters, layout, [recorder], interval=0.01)
    with collector.paused():
        collector.start()
        assert not recorder.seen.wait(timeout=0.1)
    assert recorder.seen.wait(timeout=30)
    collector.stop()


def test_snapshot_is_that_of_the_last_read(layout, counters):
    collector = Collector(counters, layout, first_layer=2)
    counters[:, layout.block("context")] = 10
    counters[:, layout.block("read").start] = 5
    assert collector.snapshot()[0]["density"] is None
    collector.flush()
    assert [layer["layer"] for layer in collector.snapshot()] == [2, 3]
    assert collector.total()["density"] == 0.5


def test_constructor_explains_mistakes(layout, counters):
    with pytest.raises(ValueError, match=r"allocate them with CounterLayout\.allocate"):
        Collector(counters.float(), layout)
    with pytest.raises(ValueError, match="interval is 0 s"):
        Collector(counters, layout, interval=0)
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        Collector(layout.allocate("meta"), layout)


def test_the_process_ends_cleanly_without_stop():
    code = (
        "import torch\n"
        "from vattn_telemetry.collector import Collector\n"
        "from vattn_telemetry.counters import CounterLayout\n"
        "layout = CounterLayout(40)\n"
        "collector = Collector(layout.allocate('cpu'), layout, interval=1e-4)\n"
        "collector.start()\n"
        "torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)\n"
    )
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr) == (0, "")
