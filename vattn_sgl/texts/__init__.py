"""Texts that may be shipped: to calibrate on, and of different kinds to demonstrate and to evaluate with."""

from __future__ import annotations

from importlib.resources import files

CALIBRATION = "gpl-3"
CALIBRATION_MORE = "gfdl-1.3"
DEMONSTRATION = "us-constitution"
EVALUATION = "alice"


def load(name: str) -> str:
    """A text by its name without suffix.

    Parameters
    ----------
    name : str
        `CALIBRATION`, `CALIBRATION_MORE`, `DEMONSTRATION` or `EVALUATION`.
    """
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
