"""Texts that may be shipped: to calibrate on, and of different kinds to demonstrate and to evaluate with."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

CALIBRATION = "gpl-3"
CALIBRATION_MORE = "gfdl-1.3"
DEMONSTRATION = "us-constitution"
EVALUATION = "alice"
EVALUATION_LEGAL = ("mpl-2.0", "lgpl-2.1")
# A module of the running Python, so it is read and not shipped.
EVALUATION_CODE = "argparse.py"


def load(name: str) -> str:
    """A text by its name without suffix.

    Parameters
    ----------
    name : str
        Of a file in this folder, see its README, or `EVALUATION_CODE`.
    """
    if name == EVALUATION_CODE:
        spec = find_spec(name.removesuffix(".py"))
        assert spec is not None and spec.origin is not None, f"Python comes with {name}"
        return Path(spec.origin).read_text(encoding="utf-8")
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
