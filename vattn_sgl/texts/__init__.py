"""Texts that may be shipped: one to calibrate on, another of a different kind to demonstrate with."""

from __future__ import annotations

from importlib.resources import files

CALIBRATION = "gpl-3"
DEMONSTRATION = "us-constitution"


def load(name: str) -> str:
    """A text by its name without suffix.

    Parameters
    ----------
    name : str
        `CALIBRATION` or `DEMONSTRATION`.
    """
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
