"""Joins the device counters of this process to the exporters."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from vattn_sgl import __version__, compat
from vattn_sgl.config import Settings
from vattn_sgl.control import RuntimeControl
from vattn_sgl.selectors import CacheGeometry, Selector
from vattn_telemetry.collector import Collector
from vattn_telemetry.counters import CounterLayout
from vattn_telemetry.metrics import CONFIG_CHANGES
from vattn_telemetry.otel import OtelExporter, otel_enabled

if TYPE_CHECKING:
    import torch
    from sglang.srt.model_executor.model_runner import ModelRunner


class Telemetry:
    """Device counters, the collector that reads them, and the gauges that follow the control.

    Attributes
    ----------
    counters : torch.Tensor
        float64 ``[num_layers, width]`` on the device; rows go to ``vattn_kernels.ops.decode``.
    edges : tuple of torch.Tensor
        Bucket borders of the three histograms, as the op takes them.
    offsets : list of int
        Block starts, as the op takes them.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        settings: Settings,
        geometry: CacheGeometry,
        selector: Selector,
        control: RuntimeControl,
    ) -> None:
        self.layout = CounterLayout(geometry.num_layers)
        self.counters = self.layout.allocate(geometry.device)
        self.edges = self.layout.edge_tensors(geometry.device)
        self.offsets = list(self.layout.offsets)
        self._heads = geometry.num_qo_heads or 0
        self._dense_token, self._dense_step = self.layout.dense_units(geometry.device)
        self.selector = selector
        self.control = control
        self._generation = -1
        self._covered = -1
        labels = compat.metric_labels(model_runner)
        self.collector = Collector(self.counters, self.layout, self._exporters(model_runner, labels))
        self.collector.set_gauge(
            "build_info",
            1,
            version=__version__,
            sglang_version=importlib.metadata.version("sglang"),
            selector=settings.selector,
            target=settings.target,
            bound=settings.effective_bound,
        )
        self.collector.set_gauge("side_data_bytes", selector.bytes_per_token() * geometry.num_slots)
        self._changes = dict.fromkeys(control.changes, 0)
        self._started = False
        control.status_provider = self.status

    @staticmethod
    def _exporters(model_runner: ModelRunner, labels: dict[str, str]) -> list[Any]:
        exporters: list[Any] = []
        if model_runner.server_args.enable_metrics:
            from vattn_telemetry.prometheus import PrometheusExporter

            exporters.append(PrometheusExporter(labels))
        if otel_enabled():
            exporters.append(OtelExporter(labels))
        return exporters

    def begin_forward(self) -> None:
        """Refresh gauges and host counters when control or calibration has moved on."""
        if not self._started:
            # Not in the constructor: a read during a CUDA graph capture would break the capture.
            self._started = True
            self.collector.start()
        for result, count in self.control.changes.items():
            if count != self._changes[result]:
                self.collector.add(CONFIG_CHANGES.key, count - self._changes[result], result=result)
                self._changes[result] = count
        if self.control.generation != self._generation:
            self._generation = self.control.generation
            self.collector.set_gauge("config_generation", self._generation)
            for layer, values in self.control.in_force().items():
                for name, value in values.items():
                    self.collector.set_gauge(name, value, layer=layer)
        covered = self.selector.covered_positions()
        if covered != self._covered:
            self._covered = covered
            self.collector.set_gauge("calibrated_positions", covered)

    def count_whole(self, lengths: torch.Tensor) -> None:
        """Count a step of every layer in which all contexts were read; without a copy from the host.

        Parameters
        ----------
        lengths : torch.Tensor
            int64 ``[batch]`` on the host, the new tokens included; a padded row has one at most and is not counted.
        """
        real = lengths > 1
        self.counters.add_(self._dense_token, alpha=self._heads * int(lengths[real].sum()))
        self.counters.add_(self._dense_step, alpha=self._heads * int(real.sum()))

    def status(self) -> dict[str, Any]:
        """State for ``GET /vattention/status``: per-layer figures since start and the calibration."""
        self.collector.flush()
        return {
            "calibrated_positions": self.selector.covered_positions(),
            "value_dimensions": list(self.selector.dimensions),
            "side_data_bytes_per_token": self.selector.bytes_per_token(),
            "total": self.collector.total(),
            "layers": self.collector.snapshot(),
        }
