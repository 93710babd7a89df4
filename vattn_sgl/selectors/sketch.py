"""Query-weighted PCA codes of keys, calibrated by the server itself (``algorithm.md``, "Sketch")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vattn_kernels import ops
from vattn_kernels.reference import sketch as reference
from vattn_kernels.sketch import UNUSABLE, WORD_BITS, SketchTables
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry, SideArguments, SideTensor
from vattn_sgl.selectors.calibrated import CalibratedSelector
from vattn_sgl.selectors.calibration import Calibration, CalibrationStore


class SketchSelector(CalibratedSelector):
    """Selector whose side data are packed codes and two norms a token and KV head.

    Attributes
    ----------
    codes : torch.Tensor
        int32 ``[num_layers, num_slots, num_kv_heads, words]``.
    """

    name = "sketch"

    def __init__(self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str) -> None:
        g, bits = geometry, settings.sketch_bits
        tables = SketchTables.zeros(g.num_layers, g.num_kv_heads, g.head_dim, bits, g.device)
        store = CalibrationStore(model_key + ("-lanes" if g.lanes else ""), geometry, bits)
        calibration = Calibration(settings, geometry, store, rope=geometry.rope)
        super().__init__(settings, geometry, layer_ids, tables, calibration)
        self.codes = self.side["codes"]

    @classmethod
    def layout(cls, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """Codes, coding error and norm of v, valid byte."""
        heads = geometry.num_kv_heads
        return (
            SideTensor("codes", (heads, settings.sketch_bits // WORD_BITS), torch.int32),
            SideTensor("norms", (heads, 2), torch.uint8),
            SideTensor("valid", (), torch.uint8),
        )

    def encode(self, layer: int, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Code ``slots``; see `vattn_kernels.ops.encode`."""
        t = self.tables
        tables = (t.mean[layer], t.key_basis[layer], t.steps[layer], t.fields[layer])
        side = (tensor[layer] for tensor in self.side.values())
        k_scale, v_scale = self.geometry.scales_of(layer)
        ops.encode(k_cache, v_cache, slots, *tables, *side, k_scale=k_scale, v_scale=v_scale)

    def encode_layers(self, pool: Any, slots: torch.Tensor) -> None:
        """Code ``slots`` of every layer; see `vattn_kernels.ops.encode_layers`."""
        t = self.tables
        k_caches, v_caches = zip(*(pool.get_kv_buffer(layer_id) for layer_id in self.layer_ids), strict=True)
        scales = [self.geometry.scales_of(layer) for layer in range(len(k_caches))]
        ops.encode_layers(
            list(k_caches), list(v_caches), slots, t.mean, t.key_basis, t.steps, t.fields, *self.side.values(),
            k_scales=[k for k, _ in scales], v_scales=[v for _, v in scales],
        )  # fmt: skip

    def side_arguments(self, layer: int) -> SideArguments:
        """Codes, norms, valid bytes and the tables that read them."""
        t = self.tables
        codes, norms, valid = (side[layer] for side in self.side.values())
        return codes, norms, valid, t.mean[layer], t.query_basis[layer], t.steps[layer], t.fields[layer]

    def invalidate(self, slots: torch.Tensor) -> None:
        """Clear the valid bits of ``slots`` in every layer, and mark their error bytes for a GPU."""
        super().invalidate(slots)
        if self.geometry.lanes:
            self.norms[:, slots, :, 0] = UNUSABLE

    def _adopt(self) -> None:
        super()._adopt()
        if self.geometry.lanes:
            self.norms[..., 0] = UNUSABLE

    def upper_bound(self, layer: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
        """`vattn_kernels.reference.sketch.upper_logits`; see `vattn_sgl.selectors.base.Selector`."""
        t, codes, norms = self.tables, self.side["codes"][layer], self.side["norms"][layer]
        grouped = q.double().unflatten(1, (self.geometry.num_kv_heads, -1))  # [T, H, G, D]
        bounds = []
        for head in range(self.geometry.num_kv_heads):
            bound = reference.upper_logits(
                grouped[:, head].flatten(0, 1), codes[slots, head], norms[slots, head], t.mean[layer, head],
                t.query_basis[layer, head], t.steps[layer, head], t.fields[layer, head], self.geometry.scale,
            )  # fmt: skip
            bounds.append(bound.float().unflatten(0, grouped.shape[::2][:2]))
        return torch.stack(bounds, 1).flatten(1, 2)
