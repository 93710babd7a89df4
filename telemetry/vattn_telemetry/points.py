"""What the collector hands to an exporter, and what an exporter must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vattn_telemetry.metrics import Metric


@dataclass(frozen=True)
class Point:
    """Change of one series since the last export.

    Attributes
    ----------
    metric : Metric
    labels : mapping of str to str
        The metric's own labels; the exporter adds the server's.
    value : float
        Increment of a counter, new value of a gauge, increment of a histogram's sum.
    bucket_counts : tuple of int
        Increments of a histogram's non-cumulative buckets, the overflow last; empty for other types.
    """

    metric: Metric
    labels: Mapping[str, str] = field(default_factory=dict)
    value: float = 0.0
    bucket_counts: tuple[int, ...] = ()


DropCallback = Callable[[str, BaseException | None], None]


class Exporter(Protocol):
    """Takes points; may raise from `export`, which the collector counts and logs once."""

    @property
    def name(self) -> str:
        """Reason under which a failed export is counted, a value of ``telemetry_dropped``'s ``reason``."""

    def attach(self, on_drop: DropCallback) -> None:
        """Receive the callback for failures that happen outside `export`."""

    def export(self, points: Sequence[Point]) -> None:
        """Apply the points; a point of increment 0 declares its series."""

    def close(self) -> None:
        """Send what is left and free what is held."""
