"""Copies of the device counters that never make a stream or the caller wait."""

from __future__ import annotations

from typing import Protocol

import torch


class CounterReader(Protocol):
    """Reads one tensor of counters."""

    def request(self) -> None:
        """Begin a copy, unless one is under way."""

    def take(self) -> torch.Tensor | None:
        """Return the requested copy on the CPU if it is complete, else None."""


class HostReader:
    """Reads counters that live in host memory.

    Parameters
    ----------
    counters : torch.Tensor
        ``[num_layers, width]``, float64, on the CPU.
    """

    def __init__(self, counters: torch.Tensor) -> None:
        self._counters = counters

    def request(self) -> None:
        """Nothing to begin: host memory is read at once."""

    def take(self) -> torch.Tensor | None:
        """Return a copy of the counters."""
        return self._counters.clone()


class CudaReader:
    """Reads counters on a CUDA device through pinned memory on a stream of its own.

    The copy is not ordered after the kernels in flight, so that it waits for none of them: a read may fall between two
    layers of a step. Every entry is monotone, so the next read makes up for it.

    Parameters
    ----------
    counters : torch.Tensor
        ``[num_layers, width]``, float64, on a CUDA device.
    """

    def __init__(self, counters: torch.Tensor) -> None:
        self._counters = counters
        self._stream = torch.cuda.Stream(device=counters.device)
        self._done = torch.cuda.Event()
        self._pinned = torch.zeros(counters.shape, dtype=counters.dtype, pin_memory=True)
        self._pending = False
        # The allocation's zero fill is the only thing on another stream that a copy must not overtake.
        self._stream.wait_stream(torch.cuda.current_stream(counters.device))

    def request(self) -> None:
        """Begin a copy on the reader's stream, unless one is under way."""
        if self._pending:
            return
        with torch.cuda.stream(self._stream):
            self._pinned.copy_(self._counters, non_blocking=True)
            self._done.record(self._stream)
        self._pending = True

    def take(self) -> torch.Tensor | None:
        """Return the requested copy if its event has passed, else None."""
        if not self._pending or not self._done.query():
            return None
        self._pending = False
        return self._pinned.clone()


def reader_for(counters: torch.Tensor) -> CounterReader:
    """Choose the reader for the device that the counters are on.

    Raises
    ------
    ValueError
        If there is no reader for that device.
    """
    if counters.device.type == "cpu":
        return HostReader(counters)
    if counters.device.type == "cuda":
        return CudaReader(counters)
    raise ValueError(
        f"counters are on {counters.device}, expected cpu or cuda: "
        "allocate them with CounterLayout.allocate on one of these"
    )
