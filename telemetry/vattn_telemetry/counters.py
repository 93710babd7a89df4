"""Layout of the device counters, in one place.

One float64 row per layer, made of blocks in a fixed order. The op that fills it gets ``CounterLayout.offsets`` and
knows only that order and the order of entries within a block; it never resets an entry.

A histogram block is ``[sum, count_0 .. count_E]`` with non-cumulative counts: ``count_j`` counts the values ``v`` with
``edges[j-1] < v <= edges[j]``, the last one what exceeds all edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch

from vattn_telemetry.metrics import AUDIT_ERROR, ESTIMATED_ERROR, OUTCOMES, READ_KINDS, SAMPLE_BUDGET

BLOCKS: Final = ("context", "read", "outcome", "budget", "error", "audit", "audit_error")
AUDIT_ENTRIES: Final = ("audits", "violations")


@dataclass(frozen=True)
class CounterLayout:
    """Where each counter of a layer lies in its row.

    Attributes
    ----------
    num_layers : int
        Layers that this process serves.
    budget_edges, error_edges, audit_error_edges : tuple of float
        Upper edges of the histograms, ascending; taken from the table of metrics.
    """

    num_layers: int
    budget_edges: tuple[float, ...] = SAMPLE_BUDGET.buckets
    error_edges: tuple[float, ...] = ESTIMATED_ERROR.buckets
    audit_error_edges: tuple[float, ...] = AUDIT_ERROR.buckets

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}, expected at least 1: pass the number of served layers")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each block, in the order of `BLOCKS`."""
        return (
            1,
            len(READ_KINDS),
            len(OUTCOMES),
            _histogram_size(self.budget_edges),
            _histogram_size(self.error_edges),
            len(AUDIT_ENTRIES),
            _histogram_size(self.audit_error_edges),
        )

    @property
    def offsets(self) -> tuple[int, ...]:
        """First entry of each block, in the order of `BLOCKS`."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    @property
    def width(self) -> int:
        """Entries of a row."""
        return sum(self.sizes)

    def block(self, name: str) -> slice:
        """Columns of a block.

        Parameters
        ----------
        name : str
            One of `BLOCKS`.

        Raises
        ------
        ValueError
            If there is no such block.
        """
        if name not in BLOCKS:
            raise ValueError(f"no counter block {name!r}; expected one of {', '.join(BLOCKS)}")
        index = BLOCKS.index(name)
        return slice(self.offsets[index], self.offsets[index] + self.sizes[index])

    def allocate(self, device: torch.device | str) -> torch.Tensor:
        """Make the counters of all layers.

        Returns
        -------
        torch.Tensor
            ``[num_layers, width]``, float64, zeros.
        """
        return torch.zeros(self.num_layers, self.width, dtype=torch.float64, device=device)

    def dense_units(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the rows that are added where the host counts what a dense kernel read.

        Returns
        -------
        tuple of torch.Tensor
            For a token of a context that was read, and for a head's step: each ``[width]``, float64.
        """
        token, step = torch.zeros(2, self.width, dtype=torch.float64)
        token[self.block("context")] = 1
        token[self.block("read").start + READ_KINDS.index("dense")] = 1
        step[self.block("outcome").start + OUTCOMES.index("dense")] = 1
        return token.to(device), step.to(device)

    def edge_tensors(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make the histogram edges as the op takes them.

        Returns
        -------
        tuple of torch.Tensor
            ``budget_edges``, ``error_edges``, ``audit_error_edges``: each ``[num_edges]``, float32.
        """
        budget, error, audit_error = (
            torch.tensor(edges, dtype=torch.float32, device=device)
            for edges in (self.budget_edges, self.error_edges, self.audit_error_edges)
        )
        return budget, error, audit_error


def _histogram_size(edges: tuple[float, ...]) -> int:
    return 1 + len(edges) + 1
