"""Types of arguments, for argparse: what is wrong is told before anything starts."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}, expected a whole number of 1 or more")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """Requests and context of ``BATCHxCONTEXT``."""
    try:
        batch, context = map(positive, text.split("x"))
    except (ArgumentTypeError, ValueError):
        raise ArgumentTypeError(f"{text!r}, expected BATCHxCONTEXT, as in 16x32768") from None
    return batch, context


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text!r}, expected a number above 0, at most 1")
    return value


def writable(text: str) -> Path:
    """A file that can be written, in a folder that there is."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{text!r}, expected a file that can be written, in a folder that exists")
    return path
