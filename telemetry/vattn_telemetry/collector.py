"""Reads the device counters on a thread of its own and feeds the exporters."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vattn_telemetry.counters import AUDIT_ENTRIES, CounterLayout
from vattn_telemetry.metrics import (
    AUDIT_ERROR,
    AUDIT_VIOLATIONS,
    AUDITS,
    CONFIG_CHANGES,
    CONTEXT_TOKENS,
    ESTIMATED_ERROR,
    HEAD_STEPS,
    OUTCOMES,
    READ_KINDS,
    READ_TOKENS,
    SAMPLE_BUDGET,
    TELEMETRY_DROPPED,
    Metric,
    find,
)
from vattn_telemetry.points import Exporter, Point
from vattn_telemetry.readers import reader_for
from vattn_telemetry.snapshot import summarize_layers, summarize_total

logger = logging.getLogger(__name__)

_FLUSH_POLL_SECONDS = 0.001

SeriesKey = tuple[str, tuple[tuple[str, str], ...]]


class Collector:
    """Turns monotone device counters into points for exporters.

    Nothing that an exporter or a read does wrong reaches the caller: it is counted in
    ``vattention_telemetry_dropped_total`` and logged once per reason.

    Parameters
    ----------
    counters : torch.Tensor
        ``[num_layers, width]``, float64, on the CPU or a CUDA device; filled by others, never written here.
    layout : CounterLayout
    exporters : sequence of Exporter
    interval : float
        Seconds between two reads.
    first_layer : int
        Index of the first row's layer in the whole model; above 0 on later pipeline stages.

    Raises
    ------
    ValueError
        If the counters do not fit the layout or the interval is not positive.

    Notes
    -----
    Construct it before, and start it after, any CUDA graph capture, or capture within `paused`: a copy or an event
    query from another thread breaks a capture in global mode.
    """

    def __init__(
        self,
        counters: torch.Tensor,
        layout: CounterLayout,
        exporters: Sequence[Exporter] = (),
        *,
        interval: float = 0.5,
        first_layer: int = 0,
    ) -> None:
        expected = (layout.num_layers, layout.width)
        if tuple(counters.shape) != expected or counters.dtype != torch.float64:
            raise ValueError(
                f"counters are {tuple(counters.shape)} {counters.dtype}, expected {expected} torch.float64: "
                "allocate them with CounterLayout.allocate"
            )
        if interval <= 0:
            raise ValueError(f"interval is {interval} s, expected more than 0: the default is 0.5")
        self.layout = layout
        self.first_layer = first_layer
        self._interval = interval
        self._exporters = tuple(exporters)
        self._reader = reader_for(counters)
        self._last = torch.zeros(expected, dtype=torch.float64)
        self._requested = False
        self._declared = False
        self._logged: set[str] = set()
        self._host_counters: dict[SeriesKey, float] = {}
        self._gauges: dict[SeriesKey, float] = {}
        self._host_lock = threading.Lock()
        self._read_lock = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        for exporter in self._exporters:
            exporter.attach(self._drop)

    def start(self) -> None:
        """Start the reading thread; a second call does nothing."""
        if self._thread is None:
            self._wake.clear()
            self._thread = threading.Thread(target=self._run, name="vattn-telemetry", daemon=True)
            self._thread.start()
            # A thread that the interpreter ends inside torch takes the process down with it.
            atexit.register(self.stop)

    def flush(self, timeout: float = 1.0) -> bool:
        """Read the counters now and export them.

        Parameters
        ----------
        timeout : float
            Seconds to wait for the copy; the calling thread waits, no stream does.

        Returns
        -------
        bool
            Whether the copy completed in time.
        """
        deadline = time.monotonic() + timeout
        with self._read_lock:
            self._requested = False
            # A copy under way was begun earlier and may lack what the caller wants to see.
            if not self._poll(deadline, discard=True):
                return False
            return self._poll(deadline, discard=False)

    def stop(self) -> None:
        """Stop the thread, export what is left, close the exporters."""
        atexit.unregister(self.stop)
        self._wake.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout=10 * self._interval + 5)
        self.flush()
        for exporter in self._exporters:
            try:
                exporter.close()
            except Exception as error:
                self._drop(exporter.name, error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Read nothing within the block, for example while a CUDA graph is captured."""
        with self._read_lock:
            yield

    def set_gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of the table.

        Parameters
        ----------
        name : str
            Key or Prometheus name, for example ``"epsilon"``.
        value : float
        **labels : str
            Exactly the labels of the metric.

        Raises
        ------
        KeyError
            If the table has no such metric.
        ValueError
            If it is no gauge or the labels do not fit.
        """
        key = _series(name, "gauge", labels)
        with self._host_lock:
            self._gauges[key] = float(value)

    def add(self, name: str, n: float = 1, **labels: str) -> None:
        """Add to a counter of the table that the host keeps.

        Parameters
        ----------
        name : str
            Key or Prometheus name, for example ``"config_changes"``.
        n : float
            Not negative.
        **labels : str
            Exactly the labels of the metric.

        Raises
        ------
        KeyError
            If the table has no such metric.
        ValueError
            If it is no counter, the labels do not fit, or `n` is negative.
        """
        if n < 0:
            raise ValueError(f"{name}: increment is {n}, expected 0 or more: counters only grow")
        key = _series(name, "counter", labels)
        with self._host_lock:
            self._host_counters[key] = self._host_counters.get(key, 0.0) + n

    def snapshot(self) -> list[dict[str, Any]]:
        """Summary per layer as of the last read; see `vattn_telemetry.snapshot.summarize_row`."""
        return summarize_layers(self.layout, self._last, self.first_layer)

    def total(self) -> dict[str, Any]:
        """Summary over all layers as of the last read."""
        return summarize_total(self.layout, self._last)

    def _run(self) -> None:
        while not self._wake.wait(self._interval):
            with self._read_lock:
                self._tick()

    def _tick(self) -> None:
        try:
            if self._requested:
                values = self._reader.take()
                if values is None:
                    self._drop("copy_pending", None)
                    self._export(None)
                    return
            else:
                self._reader.request()
                values = self._reader.take()
            self._reader.request()
            self._requested = True
        except Exception as error:
            self._requested = False
            self._drop("read_error", error)
            values = None
        self._export(values)

    def _poll(self, deadline: float, *, discard: bool) -> bool:
        try:
            self._reader.request()
            while (values := self._reader.take()) is None:
                if time.monotonic() > deadline:
                    self._drop("copy_pending", None)
                    self._requested = True
                    return False
                time.sleep(_FLUSH_POLL_SECONDS)
        except Exception as error:
            self._drop("read_error", error)
            return False
        if not discard:
            self._export(values)
        return True

    def _export(self, values: torch.Tensor | None) -> None:
        points = self._host_points()
        if values is not None:
            points += self._counter_points(values)
        if not self._declared:
            points = [*self._declarations(), *points]
            self._declared = True
        if not points:
            return
        for exporter in self._exporters:
            try:
                exporter.export(points)
            except Exception as error:
                self._drop(exporter.name, error)

    def _host_points(self) -> list[Point]:
        with self._host_lock:
            counters, self._host_counters = self._host_counters, {}
            gauges, self._gauges = self._gauges, {}
        return [Point(find(name), dict(labels), value) for (name, labels), value in (counters | gauges).items()]

    def _counter_points(self, values: torch.Tensor) -> list[Point]:
        # An entry below its last value was zeroed by its owner, so all of it is new, as Prometheus' rate() assumes.
        delta = torch.where(values < self._last, values, values - self._last).nan_to_num(0.0, 0.0, 0.0)
        self._last = values
        changed = delta.any(dim=1).nonzero().flatten().tolist()
        return [
            point for row in changed for point in self._row_points(str(self.first_layer + row), delta[row].tolist())
        ]

    def _row_points(self, layer: str, row: list[float], *, keep_zeros: bool = False) -> list[Point]:
        block = self.layout.block
        scalars: list[tuple[Metric, dict[str, str], float]] = [
            (CONTEXT_TOKENS, {}, row[block("context")][0]),
            *((READ_TOKENS, {"kind": k}, v) for k, v in zip(READ_KINDS, row[block("read")], strict=True)),
            *((HEAD_STEPS, {"outcome": o}, v) for o, v in zip(OUTCOMES, row[block("outcome")], strict=True)),
            (AUDITS, {}, row[block("audit")][AUDIT_ENTRIES.index("audits")]),
            (AUDIT_VIOLATIONS, {}, row[block("audit")][AUDIT_ENTRIES.index("violations")]),
        ]
        points = [Point(m, {"layer": layer, **extra}, value) for m, extra, value in scalars if value or keep_zeros]
        for metric, name in ((SAMPLE_BUDGET, "budget"), (ESTIMATED_ERROR, "error"), (AUDIT_ERROR, "audit_error")):
            total, *counts = row[block(name)]
            if keep_zeros or total or any(counts):
                points.append(Point(metric, {"layer": layer}, total, tuple(int(count) for count in counts)))
        return points

    def _declarations(self) -> list[Point]:
        # rate() misses the first increment of a series that was not there at 0 before.
        zeros = [0.0] * self.layout.width
        points = [
            point
            for row in range(self.layout.num_layers)
            for point in self._row_points(str(self.first_layer + row), zeros, keep_zeros=True)
        ]
        for metric in (CONFIG_CHANGES, TELEMETRY_DROPPED):
            ((label, allowed),) = metric.values.items()
            points += [Point(metric, {label: value}) for value in allowed]
        return points

    def _drop(self, reason: str, error: BaseException | None) -> None:
        allowed = TELEMETRY_DROPPED.values["reason"]
        self.add(TELEMETRY_DROPPED.key, reason=reason if reason in allowed else "exporter")
        if error is not None and reason not in self._logged:
            self._logged.add(reason)
            logger.warning(
                "telemetry: %s failed; serving is not affected, and further failures are only counted in %s",
                reason,
                TELEMETRY_DROPPED.name,
                exc_info=error,
            )


def _series(name: str, expected: str, labels: dict[str, str]) -> SeriesKey:
    metric = find(name)
    if metric.type != expected:
        raise ValueError(f"{metric.name} is a {metric.type}, expected a {expected}: use the method for that type")
    metric.check_labels(labels)
    return metric.key, tuple(sorted(labels.items()))
