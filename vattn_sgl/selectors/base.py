"""What a selector is to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vattn_sgl.config import Settings

MaybeTensor = torch.Tensor | None
SideArguments = tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]
UNCOVERED = 0
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class CacheGeometry:
    """Shape of the KV pool that a selector describes.

    Attributes
    ----------
    num_layers, num_slots, num_kv_heads, head_dim : int
        Of this rank's pool.
    device : torch.device
        Where the pool lives.
    """

    num_layers: int
    num_slots: int
    num_kv_heads: int
    head_dim: int
    device: torch.device


class Selector(Protocol):
    """Estimates log-weights of cached tokens from side data kept beside the pool.

    Attributes
    ----------
    name : str
        Value of the setting ``selector`` and of the op's argument.
    covered : torch.Tensor
        int32 ``[1]`` on the device: longest context that may be sampled; longer ones are served densely.
    """

    name: str
    covered: torch.Tensor

    def begin_forward(self, longest: int, num_tokens: int, pool: Any) -> None:
        """Called before each forward pass, between batches: apply what calibration has prepared."""
        ...

    def after_write(self, layer: int, q: torch.Tensor, slots: torch.Tensor, pool: Any) -> None:
        """Called once K and V of ``slots`` stand in the pool; ``layer`` counts from 0 on this rank."""
        ...

    def arguments(self, layer: int) -> SideArguments:
        """The op's seven side-data arguments of one layer."""
        ...

    def invalidate(self, slots: torch.Tensor) -> None:
        """Forget the side data of slots that somebody else has written."""
        ...

    def bytes_per_token(self) -> int:
        """Side data of one slot over all layers, in bytes."""
        ...

    def covered_positions(self) -> int:
        """Host copy of ``covered``; 0 while nothing can be sampled."""
        ...


class SelectorFactory(Protocol):
    """Builds a selector for a pool."""

    def __call__(
        self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str
    ) -> Selector: ...
