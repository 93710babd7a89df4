from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vattn_telemetry.counters import CounterLayout
from vattn_telemetry.snapshot import bucket_quantile, summarize_layers, summarize_total

EDGES = (1.0, 2.0, 4.0)


def test_quantile_interpolates_within_the_bucket():
    assert bucket_quantile([0, 10, 0, 0], EDGES, 0.5) == pytest.approx(1.5)
    assert bucket_quantile([10, 10, 0, 0], EDGES, 0.75) == pytest.approx(1.5)
    assert bucket_quantile([4, 0, 0, 0], EDGES, 0.5) == pytest.approx(0.5)


def test_quantile_in_the_overflow_is_the_last_edge_and_of_nothing_is_none():
    assert bucket_quantile([1, 0, 0, 99], EDGES, 0.95) == 4.0
    assert bucket_quantile([0, 0, 0, 0], EDGES, 0.95) is None


def test_quantile_wants_the_overflow():
    with pytest.raises(ValueError, match="3 counts for 3 edges, expected 4"):
        bucket_quantile([0, 0, 0], EDGES, 0.5)


@given(st.lists(st.floats(0.01, 3.99), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_quantile_lies_in_the_bucket_of_the_exact_one(values, q):
    counts = np.bincount(np.searchsorted(EDGES, values), minlength=4)
    exact = np.quantile(values, q, method="inverted_cdf")
    bucket = int(np.searchsorted(EDGES, exact))
    estimate = bucket_quantile(counts.tolist(), EDGES, q)
    lower = 0.0 if bucket == 0 else EDGES[bucket - 1]
    assert lower - 1e-9 <= estimate <= EDGES[bucket] + 1e-9


def filled_layout():
    layout = CounterLayout(2)
    counters = layout.allocate("cpu")
    row = counters[1]
    row[layout.block("context")] = 1000
    row[layout.block("read")] = row.new_tensor([10, 20, 30, 40, 0])
    row[layout.block("outcome")] = row.new_tensor([6, 1, 1, 2])
    budget = row[layout.block("budget")]
    budget[0], budget[1] = 80, 8
    error = row[layout.block("error")]
    error[0], error[1 + layout.error_edges.index(0.05)] = 0.36, 8
    row[layout.block("audit")] = row.new_tensor([4, 1])
    return layout, counters


def test_summary_of_a_layer():
    layout, counters = filled_layout()
    summary = summarize_layers(layout, counters, first_layer=10)[1]
    assert summary["layer"] == 11
    assert summary["density"] == pytest.approx(0.1)
    assert summary["context_tokens"] == 1000
    assert summary["read"] == {"sink": 10, "window": 20, "top_k": 30, "sample": 40, "dense": 0}
    assert summary["outcome"] == {"certified": 6, "uncertified": 1, "capped": 1, "dense": 2}
    assert summary["certified_ratio"] == pytest.approx(6 / 8)
    assert summary["budget_mean"] == pytest.approx(10)
    assert summary["error_mean"] == pytest.approx(0.045)
    assert 0.04 < summary["error_p95"] <= 0.05
    assert (summary["audits"], summary["audit_violations"]) == (4, 1)


def test_layer_without_traffic_has_nones_and_is_json():
    layout, counters = filled_layout()
    counters[0, layout.block("error").start] = float("nan")
    summaries = summarize_layers(layout, counters)
    assert summaries[0]["density"] is None
    assert summaries[0]["error_p95"] is None
    assert json.loads(json.dumps(summaries, allow_nan=False)) == summaries


def test_total_adds_the_layers():
    layout, counters = filled_layout()
    counters[0] = counters[1]
    total = summarize_total(layout, counters)
    assert total["layer"] == "all"
    assert total["context_tokens"] == 2000
    assert total["density"] == pytest.approx(0.1)
