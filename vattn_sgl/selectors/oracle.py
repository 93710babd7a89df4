"""Exact scores from the whole cache: the yardstick of every other selector, and no faster than dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vattn_kernels import dimensions
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import UNLIMITED, CacheGeometry, SideArguments, SideTensor


class OracleSelector:
    """Selector without side data; see `vattn_sgl.selectors.base.Selector`."""

    name = "oracle"

    @classmethod
    def layout(cls, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """No side data."""
        return ()

    def __init__(self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str) -> None:
        self.covered = torch.tensor([UNLIMITED], dtype=torch.int32, device=geometry.device)
        self.dimensions = (dimensions.MOST,) * geometry.num_layers

    def begin_forward(self, longest: int, num_tokens: int, pool: Any) -> None:
        """Nothing to prepare."""

    def after_write(self, layer: int, q: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, pool: Any) -> None:
        """Nothing to keep."""

    def arguments(self, layer: int) -> SideArguments:
        """No side data."""
        return None, None, None, None, None, None, None

    def invalidate(self, slots: torch.Tensor) -> None:
        """Nothing can be stale."""

    def bytes_per_token(self) -> int:
        """Zero."""
        return 0

    def upper_bound(self, layer: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
        """None: exact scores need no bound."""
        return None

    def covered_positions(self) -> int:
        """Every position."""
        return UNLIMITED
