"""What a selector is to the backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch

from vattn_kernels.rope import Rope
from vattn_sgl.config import Settings

MaybeTensor = torch.Tensor | None
SideArguments = tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]
UNCOVERED = 0
# One for all layers, kept beside the side data: where the key stands that was last written to a slot.
POSITION_DTYPE = torch.int32
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
    dtype : torch.dtype
        Of K and V.
    num_qo_heads : int or None
        Query heads on this rank; None where they are not known.
    sm_scale : float or None
        Factor of the logits; None takes ``head_dim^-1/2``.
    rope : Rope or None
        Rotation of every layer's queries and keys; None where it is not known.
    scales : tuple of (float, float)
        What K and V of each layer are multiplied by when they are read, from `vattn_sgl.compat.kv_scales`.
    """

    num_layers: int
    num_slots: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    num_qo_heads: int | None = None
    sm_scale: float | None = None
    rope: Rope | None = None
    scales: tuple[tuple[float, float], ...] = ()

    def scales_of(self, layer: int) -> tuple[float, float]:
        """Scales of one layer's K and V; 1 in a pool that has none."""
        return self.scales[layer] if self.scales else (1.0, 1.0)

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.head_dim**-0.5 if self.sm_scale is None else self.sm_scale

    @property
    def lanes(self) -> bool:
        """Whether codes lie as a GPU reads them, see `vattn_kernels.sketch.SketchTables`."""
        return self.device.type == "cuda"

    def kv_bytes_per_token(self) -> int:
        """K and V of one slot over all layers, in bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class SideTensor:
    """One tensor of side data, by row; a row describes ``slots`` consecutive slots of one layer.

    Attributes
    ----------
    name : str
        Of the op's argument.
    shape : tuple of int
        Of a row.
    dtype : torch.dtype
        Of the tensor.
    slots : int
        Slots that share a row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slots: int = 1

    def allocate(self, geometry: CacheGeometry) -> torch.Tensor:
        """Zeros ``[num_layers, rows, *shape]``; on a GPU one head's rows stand side by side."""
        rows = -(-geometry.num_slots // self.slots)
        if geometry.device.type == "cuda" and self.shape:
            heads, *rest = self.shape
            # A kernel reads one head of consecutive slots.
            memory = torch.zeros(geometry.num_layers, heads, rows, *rest, dtype=self.dtype, device=geometry.device)
            return memory.transpose(1, 2)
        return torch.zeros(geometry.num_layers, rows, *self.shape, dtype=self.dtype, device=geometry.device)


def bytes_per_token(layout: Sequence[SideTensor], num_layers: int) -> int:
    """Side data of one slot over all layers and its position, in bytes, rounded up; 0 without side data."""
    shares = [Fraction(math.prod(t.shape) * t.dtype.itemsize, t.slots) for t in layout]
    return math.ceil(num_layers * sum(shares)) + (POSITION_DTYPE.itemsize if shares else 0)


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

    @property
    def dimensions(self) -> tuple[float, ...]:
        """Effective dimensions of each layer's values, for bound ``f8``; see `vattn_kernels.dimensions`."""
        ...

    def begin_forward(self, longest: int, num_tokens: int, pool: Any) -> None:
        """Called before each forward pass, between batches: apply what calibration has prepared."""
        ...

    def after_write(self, layer: int, q: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, pool: Any) -> None:
        """Called once K and V of ``slots`` stand in the pool; ``layer`` counts from 0 on this rank."""
        ...

    def arguments(self, layer: int) -> SideArguments:
        """The op's seven side-data arguments of one layer."""
        ...

    def invalidate(self, slots: torch.Tensor) -> None:
        """Forget the side data of slots that somebody else has written."""
        ...

    def bytes_per_token(self) -> int:
        """As the function of that name says."""
        ...

    def upper_bound(self, layer: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
        """Provable upper bound of the logits, or None where the selector has none.

        Parameters
        ----------
        layer : int
            Index on this rank.
        q : torch.Tensor
            ``[num_tokens, num_qo_heads, head_dim]``.
        slots : torch.Tensor
            int64 ``[n]`` valid slots.

        Returns
        -------
        torch.Tensor or None
            float32 ``[num_tokens, num_qo_heads, n]``.
        """
        ...

    def covered_positions(self) -> int:
        """Host copy of ``covered``; 0 while nothing can be sampled."""
        ...


class SelectorFactory(Protocol):
    """Builds a selector for a pool, and says beforehand what it will keep."""

    def layout(self, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """Side data of a pool of this geometry."""
        ...

    def __call__(
        self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str
    ) -> Selector: ...
