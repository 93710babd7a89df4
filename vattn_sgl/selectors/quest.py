"""Page bounds of keys (Quest, arXiv 2406.10774), weighed by a calibrated line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattn_kernels import line, ops, pages
from vattn_kernels.sketch import Moments
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry, SideArguments, SideTensor
from vattn_sgl.selectors.calibrated import CalibratedSelector
from vattn_sgl.selectors.calibration import SAMPLE_TOKENS, Calibration, CalibrationStore, even_sample


class QuestSelector(CalibratedSelector):
    """Selector whose side data are the least and greatest key of every 16 slots, and the norm of v.

    All tokens of a page share a score, so it tells little where neighbouring slots hold unlike keys.

    Attributes
    ----------
    bounds : torch.Tensor
        K's dtype ``[num_layers, num_pages, num_kv_heads, 2, head_dim]``.
    """

    name = "quest"

    def __init__(self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str) -> None:
        g = geometry
        tables = line.LineTables.zeros(g.num_layers, g.num_kv_heads, g.head_dim, g.device)
        store = CalibrationStore(f"{model_key}-quest", geometry, 0, line.LineTables)
        super().__init__(settings, geometry, layer_ids, tables, Calibration(settings, geometry, store, self._line))
        self.bounds = self.side["codes"]

    @classmethod
    def layout(cls, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """Bounds of a page, norm of v, valid byte."""
        heads = geometry.num_kv_heads
        return (
            SideTensor("codes", (heads, 2, geometry.head_dim), geometry.dtype, pages.PAGE),
            SideTensor("norms", (heads, 1), torch.uint8),
            SideTensor("valid", (), torch.uint8),
        )

    def encode(self, layer: int, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Bound the pages of ``slots``; see `vattn_kernels.ops.encode_pages`."""
        ops.encode_pages(k_cache, v_cache, slots, *(side[layer] for side in self.side.values()))

    def side_arguments(self, layer: int) -> SideArguments:
        """Bounds, norms, valid bytes and the line."""
        bounds, norms, valid = (side[layer] for side in self.side.values())
        return bounds, norms, valid, self.tables.mean[layer], None, self.tables.line[layer], None

    def sample(self, slots: torch.Tensor) -> torch.Tensor:
        """Whole pages past the sinks, evenly spread; where there is none, runs of 16 slots stand for pages.

        A sink is read whatever its score, and a line that allows for the bound of its page flattens all others.
        """
        past = slots[self.positions[slots] >= pages.PAGE]
        slots = past if past.numel() else slots
        members = torch.bincount(slots // pages.PAGE)
        whole = (members == pages.PAGE).nonzero()[:, 0]
        if whole.numel() == 0:
            return even_sample(slots)[: slots.numel() // pages.PAGE * pages.PAGE]
        count = min(SAMPLE_TOKENS // pages.PAGE, whole.numel())
        chosen = whole[torch.linspace(0, whole.numel() - 1, count, device=slots.device).long()]
        return (chosen[:, None] * pages.PAGE + torch.arange(pages.PAGE, device=slots.device)).flatten()

    def upper_bound(self, layer: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
        """`vattn_kernels.pages.upper_bound` of each token's page; see `vattn_sgl.selectors.base.Selector`."""
        bounds = self.bounds[layer, slots // pages.PAGE].float()  # [n, H, 2, D]
        grouped = q.float().unflatten(1, (self.geometry.num_kv_heads, -1))  # [T, H, G, D]
        heads = [
            pages.upper_bound(grouped[:, head].flatten(0, 1), bounds[:, head], self.geometry.scale)
            for head in range(self.geometry.num_kv_heads)
        ]
        return torch.stack([head.unflatten(0, grouped.shape[::2][:2]) for head in heads], 1).flatten(1, 2)

    def _line(self, moments: Moments, keys: torch.Tensor, queries: torch.Tensor) -> line.LineTables:
        scale = self.geometry.scale
        return line.solve(
            moments, queries, keys, scale, lambda layer, head, q, k, mean: pages.sample_features(q, k, mean, scale)
        )
