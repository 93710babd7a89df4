from __future__ import annotations

import re

import pytest

from vattn_telemetry.metrics import AUDIT_ERROR, ESTIMATED_ERROR, METRICS, find


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_names_follow_the_conventions(metric):
    assert re.fullmatch(r"vattention_[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    assert re.fullmatch(r"vattention\.[a-z0-9_.]+", metric.otel_name)
    assert metric.help.endswith(".") and "\n" not in metric.help
    assert set(metric.values) <= set(metric.labels)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_only_histograms_have_buckets_and_they_ascend(metric):
    assert bool(metric.buckets) == (metric.type == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_names_are_unique():
    for names in ([m.name for m in METRICS], [m.otel_name for m in METRICS], [m.key for m in METRICS]):
        assert len(names) == len(set(names))


def test_error_histograms_have_an_edge_at_the_default_epsilon():
    assert 0.05 in ESTIMATED_ERROR.buckets
    assert ESTIMATED_ERROR.buckets == AUDIT_ERROR.buckets


def test_find_takes_key_and_full_name_and_says_what_exists():
    assert find("context_tokens") is find("vattention_context_tokens_total")
    with pytest.raises(KeyError, match=r"no metric 'contxt'.*context_tokens"):
        find("contxt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"layer": "0"}, "expected \\['kind', 'layer'\\]"),
        ({"layer": "0", "kind": "tail"}, "kind='tail' is not one of sink, window"),
        ({"layer": "0", "kind": "sink", "rid": "7"}, "rid"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        find("read_tokens").check_labels(labels)
