"""The gauges and host counters that follow control and calibration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vattn_sgl import control, telemetry
from vattn_sgl.config import PatchError, Settings
from vattn_sgl.selectors.base import CacheGeometry

QO_HEADS = 3
GEOMETRY = CacheGeometry(2, 100, 1, 16, torch.device("cpu"), num_qo_heads=QO_HEADS)


class Recorder:
    """An exporter that keeps the last value of every gauge and the sum of every counter."""

    name = "recorder"

    def __init__(self):
        self.values = {}

    def attach(self, drop):
        self.drop = drop

    def export(self, points):
        for point in points:
            key = (point.metric.key, *sorted(point.labels.values()))
            added = self.values.get(key, 0) if point.metric.type == "counter" else 0
            self.values[key] = added + point.value

    def close(self):
        """Nothing to close."""


@pytest.fixture
def parts(monkeypatch):
    """Telemetry of two layers on a control, with a recorder for an exporter."""
    recorder = Recorder()
    monkeypatch.setattr(telemetry.Telemetry, "_exporters", staticmethod(lambda runner, labels: [recorder]))
    args = SimpleNamespace(served_model_name="m", disaggregation_mode="null", enable_metrics=False)
    settings = Settings(layers={"1": {"epsilon": 0.01}})
    selector = SimpleNamespace(covered_positions=lambda: 7, dimensions=(8.0,), bytes_per_token=lambda: 11)
    current = control.RuntimeControl(settings, 2, "cpu")
    made = telemetry.Telemetry(SimpleNamespace(server_args=args), settings, GEOMETRY, selector, current)
    yield made, current, recorder.values
    made.collector.stop()


def test_gauges_at_start(parts):
    made, _, values = parts
    made.begin_forward()
    made.collector.flush()
    assert values[("epsilon", "all")] == 0.05
    assert values[("epsilon", "1")] == 0.01
    assert values[("delta", "all")] == 0.05
    assert values[("calibrated_positions",)] == 7
    assert values[("side_data_bytes",)] == 1100
    assert values[("config_generation",)] == 0


def test_changes_are_counted_and_the_gauge_follows(parts):
    made, current, values = parts
    current.stage({"epsilon": 0.3})
    with pytest.raises(PatchError):
        current.stage({"epsilon": 3})
    current.apply_staged()
    made.begin_forward()
    made.collector.flush()
    assert values[("config_changes", "applied")] == 1
    assert values[("config_changes", "rejected")] == 1
    assert values[("epsilon", "all")] == 0.3
    assert values[("config_generation",)] == 1


def test_a_step_read_whole_is_counted_in_every_layer(parts):
    made, current, _ = parts
    made.count_whole(torch.tensor([100, 7, 1, 0]))
    for row in current.status()["layers"]:
        assert row["context_tokens"] == row["read"]["dense"] == 107 * QO_HEADS
        assert row["outcome"] == {"certified": 0, "uncertified": 0, "capped": 0, "dense": 2 * QO_HEADS}
        assert row["density"] == 1


def test_status_holds_every_layer(parts):
    made, current, _ = parts
    made.counters[1, made.layout.block("context")] += 10
    made.counters[1, made.layout.block("read")] += torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0])
    status = current.status()
    assert [row["layer"] for row in status["layers"]] == [0, 1]
    assert status["layers"][1]["density"] == pytest.approx(0.4)
    assert status["calibrated_positions"] == 7
    assert status["side_data_bytes_per_token"] == 11
