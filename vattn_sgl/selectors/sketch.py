"""Query-weighted PCA codes of keys, calibrated by the server itself (``algorithm.md``, "Sketch")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from vattn_kernels import ops
from vattn_kernels.sketch import WORD_BITS, SketchTables
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import UNCOVERED, CacheGeometry, SideArguments
from vattn_sgl.selectors.calibration import Calibration, CalibrationStore

logger = logging.getLogger(__name__)

ENCODE_BLOCK = 4096


class SketchSelector:
    """Selector whose side data are packed codes and two norms a token and KV head.

    Until it is calibrated nothing is covered and every request is served densely. Side data are computed from K and V
    as they stand in the pool, so they follow whatever wrote the slot.

    Attributes
    ----------
    codes : torch.Tensor
        int32 ``[num_layers, num_slots, num_kv_heads, words]``.
    norms : torch.Tensor
        uint8 ``[num_layers, num_slots, num_kv_heads, 2]``.
    valid : torch.Tensor
        uint8 ``[num_layers, num_slots]``: the slot's codes belong to the K it holds.
    """

    name = "sketch"

    def __init__(self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str) -> None:
        g, bits = geometry, settings.sketch_bits
        rows = (g.num_layers, g.num_slots)
        self.geometry = g
        self.layer_ids = list(layer_ids)
        self.codes = torch.zeros(*rows, g.num_kv_heads, bits // WORD_BITS, dtype=torch.int32, device=g.device)
        self.norms = torch.zeros(*rows, g.num_kv_heads, 2, dtype=torch.uint8, device=g.device)
        self.valid = torch.zeros(*rows, dtype=torch.uint8, device=g.device)
        self.written = torch.zeros(g.num_slots, dtype=torch.bool, device=g.device)
        self.tables = SketchTables.zeros(g.num_layers, g.num_kv_heads, g.head_dim, bits, g.device)
        self.covered = torch.zeros(1, dtype=torch.int32, device=g.device)
        self.calibration = Calibration(settings, geometry, CalibrationStore(model_key, geometry, bits))
        self._observing = False
        self._arguments: list[SideArguments] = []
        self._encoders: list[tuple[torch.Tensor, ...]] = []
        for layer in range(g.num_layers):
            t = self.tables
            side = (self.codes[layer], self.norms[layer], self.valid[layer])
            self._arguments.append((*side, t.mean[layer], t.query_basis[layer], t.steps[layer], t.fields[layer]))
            self._encoders.append((t.mean[layer], t.key_basis[layer], t.steps[layer], t.fields[layer], *side))
        if self.calibration.tables is not None:
            self._adopt()
            logger.info("vattention: calibration loaded, it covers contexts up to %d tokens", self.covered_positions())
        else:
            logger.info(
                "vattention: not calibrated; serving densely until %d tokens have been prefilled",
                settings.calibration_tokens,
            )

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
        if self.calibration.due():
            self._solve(pool)
        self._observing = self.calibration.wants(longest, num_tokens)

    def after_write(self, layer: int, q: torch.Tensor, slots: torch.Tensor, pool: Any) -> None:
        """Observe queries and keys while calibrating, and code the new slots.

        Parameters
        ----------
        layer : int
            Index on this rank.
        q : torch.Tensor
            ``[num_tokens, num_qo_heads, head_dim]`` after RoPE.
        slots : torch.Tensor
            int64 ``[num_tokens]``.
        pool : Any
            SGLang's KV pool.
        """
        k_cache, v_cache = pool.get_kv_buffer(self.layer_ids[layer])
        if layer == 0:
            self.written[slots] = True
        if self._observing:
            self.calibration.observe(layer, q, k_cache[slots])
        if self.calibration.tables is not None:
            ops.encode(k_cache, v_cache, slots, *self._encoders[layer])

    def arguments(self, layer: int) -> SideArguments:
        """The op's side-data arguments of one layer."""
        return self._arguments[layer]

    def invalidate(self, slots: torch.Tensor) -> None:
        """Clear the valid bits of ``slots`` in every layer."""
        self.valid[:, slots] = 0

    def bytes_per_token(self) -> int:
        """Codes, norms and valid bits of one slot over all layers."""
        return sum(t[:, :1].numel() * t.element_size() for t in (self.codes, self.norms, self.valid))

    def covered_positions(self) -> int:
        """Longest context the calibration covers, 0 before the first."""
        return self.calibration.covered if self.calibration.tables is not None else UNCOVERED

    def _solve(self, pool: Any) -> None:
        slots = self.written.nonzero()[:, 0]
        self.calibration.solve(lambda layer, sample: pool.get_key_buffer(self.layer_ids[layer])[sample], slots)
        self._adopt()
        for layer, layer_id in enumerate(self.layer_ids):
            k_cache, v_cache = pool.get_kv_buffer(layer_id)
            for block in slots.split(ENCODE_BLOCK):
                ops.encode(k_cache, v_cache, block, *self._encoders[layer])
        logger.info(
            "vattention: calibrated on %d tokens, covers contexts up to %d tokens, %d cached tokens indexed",
            self.calibration.observed_tokens,
            self.covered_positions(),
            slots.numel(),
        )

    def _adopt(self) -> None:
        assert self.calibration.tables is not None
        self.tables.copy_(self.calibration.tables)
        self.valid.zero_()
        self.covered.fill_(self.calibration.covered)
