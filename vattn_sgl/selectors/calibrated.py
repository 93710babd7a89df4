"""What all selectors with side data share: calibration, indexing of new slots, valid bits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import (
    POSITION_DTYPE,
    UNCOVERED,
    CacheGeometry,
    SideArguments,
    SideTensor,
    bytes_per_token,
)
from vattn_sgl.selectors.calibration import Calibration, even_sample

logger = logging.getLogger(__name__)

ENCODE_BLOCK = 4096
NEVER_WRITTEN = -1


class CalibratedSelector:
    """Selector whose side data are computed from K and V as they stand in the pool, whatever wrote the slot.

    Until it is calibrated nothing is covered and every request is served densely. A subclass allocates its tables,
    makes its calibration and implements `layout`, `encode` and `side_arguments`.

    Attributes
    ----------
    valid : torch.Tensor
        uint8 ``[num_layers, num_slots]``: the slot's side data belong to the K it holds.
    norms : torch.Tensor
        uint8 ``[num_layers, num_slots, num_kv_heads, 1 or 2]``.
    positions : torch.Tensor
        int32 ``[num_slots]``: position of the key that was last written, or `NEVER_WRITTEN`; other slots can be indexed
        again.
    """

    name = ""

    def __init__(
        self,
        settings: Settings,
        geometry: CacheGeometry,
        layer_ids: Sequence[int],
        tables: Any,
        calibration: Calibration,
    ) -> None:
        self.geometry = geometry
        self.layer_ids = list(layer_ids)
        self.tables = tables
        self.calibration = calibration
        self.side = {t.name: t.allocate(geometry) for t in self.layout(settings, geometry)}
        self.side_bytes = bytes_per_token(self.layout(settings, geometry), geometry.num_layers)
        self.norms, self.valid = self.side["norms"], self.side["valid"]
        self.positions = torch.full((geometry.num_slots,), NEVER_WRITTEN, dtype=POSITION_DTYPE, device=geometry.device)
        self.covered = torch.zeros(1, dtype=torch.int32, device=geometry.device)
        self._observing = False
        # A captured graph cannot learn later that there is a calibration. Codes of empty tables are harmless: nothing
        # is covered until the first calibration, which clears them.
        # After the last layer for them all, by one launch where a kernel can: a step reads a new token whole, for it
        # lies in the window.
        self._encodes_at_once = geometry.device.type == "cuda"
        self._arguments = [self.side_arguments(layer) for layer in range(geometry.num_layers)]
        if calibration.tables is not None:
            self._adopt()
            logger.info("vattention: calibration loaded, it covers contexts up to %d tokens", self.covered_positions())
        else:
            logger.info("vattention: not calibrated; serving densely until %d tokens are prefilled", calibration.needed)

    @classmethod
    def layout(cls, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """Side data of a pool of this geometry."""
        raise NotImplementedError

    def encode(self, layer: int, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Index ``slots`` of one layer from what the pool holds, and mark them valid."""
        raise NotImplementedError

    def encode_layers(self, pool: Any, slots: torch.Tensor) -> None:
        """Index ``slots`` of every layer: layer by layer where a subclass has no kernel for all at once."""
        for layer, layer_id in enumerate(self.layer_ids):
            k_cache, v_cache = pool.get_kv_buffer(layer_id)
            self.encode(layer, k_cache, v_cache, slots)

    def side_arguments(self, layer: int) -> SideArguments:
        """The op's seven side-data arguments, as views that stay."""
        raise NotImplementedError

    def sample(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots whose keys the calibration sees."""
        return even_sample(slots)

    def begin_forward(self, longest: int, num_tokens: int, pool: Any) -> None:
        """Solve a calibration that has seen enough, and say whether this pass shall be observed.

        Parameters
        ----------
        longest : int
            Longest context of the coming pass, in tokens.
        num_tokens : int
            Tokens that the pass computes.
        pool : Any
            SGLang's KV pool.
        """
        if self.calibration.due(longest):
            self._solve(pool, longest)
        self._observing = self.calibration.wants(longest, num_tokens)

    def after_write(self, layer: int, q: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, pool: Any) -> None:
        """Observe queries and keys while calibrating, and index the new slots.

        Parameters
        ----------
        layer : int
            Index on this rank.
        q : torch.Tensor
            ``[num_tokens, num_qo_heads, head_dim]`` after RoPE.
        slots : torch.Tensor
            int64 ``[num_tokens]``.
        positions : torch.Tensor
            int64 ``[num_tokens]``.
        pool : Any
            SGLang's KV pool.
        """
        k_cache, v_cache = pool.get_kv_buffer(self.layer_ids[layer])
        if layer == 0:
            self.positions[slots] = positions.to(POSITION_DTYPE)
        if self._observing:
            self.calibration.observe(
                layer, q, self._gather(k_cache, slots, self.geometry.scales_of(layer)[0]), positions
            )
        if not self._encodes_at_once:
            if self.calibration.tables is not None:
                self.encode(layer, k_cache, v_cache, slots)
        elif layer == self.geometry.num_layers - 1:
            self.encode_layers(pool, slots)

    def arguments(self, layer: int) -> SideArguments:
        """The op's side-data arguments of one layer."""
        return self._arguments[layer]

    def cached(self, pool: Any, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of ``slots`` as attention reads them, each ``[num_slots, num_kv_heads, head_dim]``."""
        caches, scales = pool.get_kv_buffer(self.layer_ids[layer]), self.geometry.scales_of(layer)
        k, v = (self._gather(cache, slots, scale) for cache, scale in zip(caches, scales, strict=True))
        return k, v

    def _gather(self, cache: torch.Tensor, slots: torch.Tensor, scale: float) -> torch.Tensor:
        if not self.geometry.scales:
            return cache[slots]
        # Not every device gathers fp8, but each gathers bytes.
        return cache.view(torch.uint8)[slots].view(cache.dtype).float() * scale

    def written(self) -> torch.Tensor:
        """Slots that hold a key, int64; waits for the device."""
        return (self.positions > NEVER_WRITTEN).nonzero()[:, 0]

    def invalidate(self, slots: torch.Tensor) -> None:
        """Clear the valid bits of ``slots`` in every layer."""
        self.valid[:, slots] = 0

    def bytes_per_token(self) -> int:
        """See `vattn_sgl.selectors.base.bytes_per_token`."""
        return self.side_bytes

    def covered_positions(self) -> int:
        """Longest context the calibration covers, 0 before the first."""
        return self.calibration.covered if self.calibration.tables is not None else UNCOVERED

    @property
    def dimensions(self) -> tuple[float, ...]:
        """Effective dimensions of each layer's values, as calibration has found them."""
        return self.calibration.dimensions

    def upper_bound(self, layer: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
        """None: the side data prove nothing."""
        return None

    def _solve(self, pool: Any, longest: int) -> None:
        slots = self.written()
        self.calibration.solve(
            lambda layer, sample: self.cached(pool, layer, sample),
            slots,
            self.positions,
            longest,
            self.sample,
        )
        self._adopt()
        for layer, layer_id in enumerate(self.layer_ids):
            k_cache, v_cache = pool.get_kv_buffer(layer_id)
            for block in slots.split(ENCODE_BLOCK):
                self.encode(layer, k_cache, v_cache, block)
        logger.info(
            "vattention: calibrated on %d tokens, covers contexts up to %d tokens, %d cached tokens indexed",
            self.calibration.observed_tokens,
            self.covered_positions(),
            slots.numel(),
        )

    def _adopt(self) -> None:
        self.tables.copy_(self.calibration.tables)
        self.valid.zero_()
        self.covered.fill_(self.calibration.covered)
