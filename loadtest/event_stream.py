"""Reads the server-sent events of a streamed completion."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StreamTimings:
    """Times of one stream, in seconds from the request.

    Attributes
    ----------
    first_token, last_token, total : float
    output_tokens : int
        As the server reports them, else the number of events with text.
    """

    first_token: float
    last_token: float
    total: float
    output_tokens: int

    @property
    def per_output_token(self) -> float | None:
        """Mean seconds between two tokens; None with fewer than two."""
        if self.output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.output_tokens - 1)


def read_stream(lines: Iterable[bytes], started: float) -> StreamTimings:
    """Read a stream to its end.

    Parameters
    ----------
    lines : iterable of bytes
        Lines of the response's body.
    started : float
        `time.perf_counter` at the request.

    Raises
    ------
    ValueError
        If the stream reports an error, carries no text, or ends without ``[DONE]``.
    """
    first = last = 0.0
    events = tokens = 0
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            if not events:
                raise ValueError("the stream carried no text; expected at least one token")
            return StreamTimings(first, last, time.perf_counter() - started, tokens or events)
        event = json.loads(data)
        if "error" in event:
            raise ValueError(f"the server reported an error in the stream: {event['error']}")
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if _has_text(event):
            last = time.perf_counter() - started
            first = first or last
            events += 1
    raise ValueError("the stream ended without [DONE]: the server closed the connection early")


def _has_text(event: dict[str, Any]) -> bool:
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False
