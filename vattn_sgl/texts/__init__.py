"""Texts that may be shipped: to calibrate on, and of different kinds to demonstrate and to evaluate with."""

from __future__ import annotations

from importlib.resources import files

CALIBRATION = "gpl-3"
CALIBRATION_MORE = "gfdl-1.3"
DEMONSTRATION = "us-constitution"
EVALUATION = "alice"
EVALUATION_LEGAL = ("mpl-2.0", "lgpl-2.1")


def load(name: str) -> str:
    """A text by its name without suffix.

    Parameters
    ----------
    name : str
        Of a file in this folder, see its README.
    """
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
