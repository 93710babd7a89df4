from __future__ import annotations

import time

import pytest
import torch

from vattn_telemetry.collector import Collector
from vattn_telemetry.counters import CounterLayout

pytestmark = pytest.mark.gpu


def test_read_does_not_wait_for_the_compute_stream():
    layout = CounterLayout(2)
    counters = layout.allocate("cuda")
    collector = Collector(counters, layout)
    # The first use of a kernel loads it, which waits for the device.
    counters[0, 0] += 1
    torch.cuda.synchronize()
    assert collector.flush()
    # About a second of work on the compute stream, far longer than the time-out of the flush below.
    torch.cuda._sleep(2_000_000_000)
    counters[0, 0] += 7
    assert collector.flush(timeout=0.3)
    assert collector.snapshot()[0]["context_tokens"] == 1
    torch.cuda.synchronize()
    assert collector.flush()
    assert collector.snapshot()[0]["context_tokens"] == 8


def test_graph_is_captured_while_paused():
    layout = CounterLayout(1)
    counters = layout.allocate("cuda")
    counters[0, 0] += 1
    torch.cuda.synchronize()
    collector = Collector(counters, layout, interval=0.001)
    collector.start()
    graph = torch.cuda.CUDAGraph()
    with collector.paused(), torch.cuda.graph(graph):
        counters[0, 0] += 1
        # Long enough for many reads, were they not paused.
        time.sleep(0.1)
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    collector.stop()
    assert collector.snapshot()[0]["context_tokens"] == 1001
