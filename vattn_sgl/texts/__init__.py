"""Texts that may be shipped: to calibrate on, and of different kinds to demonstrate and to evaluate with."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

CALIBRATION = "gpl-3"
CALIBRATION_MORE = "gfdl-1.3"
DEMONSTRATION = "us-constitution"
EVALUATION = "alice"
# These come with the running Python, so they are read and not shipped.
EVALUATION_CODE = ("argparse.py", "tarfile.py")
EVALUATION_MANUAL = "python-reference"
# What was chosen by a text; by the others nothing was.
_FAR_CODES = "what is read for certain because its code misses by far was chosen by it"
IN_SIGHT = {
    "alice": "most defaults were chosen by it",
    "us-constitution": f"{_FAR_CODES}, and what fewer dimensions would cost was measured on it",
    "argparse.py": _FAR_CODES,
}
# What was known of a text before the last choice.
SEEN = {"tarfile.py": "that a head of layer 0 erred too often showed on it too"}


def load(name: str) -> str:
    """A text by its name.

    Parameters
    ----------
    name : str
        Of a file in this folder without its suffix, see its README, or one of `EVALUATION_CODE`, or
        `EVALUATION_MANUAL`.
    """
    if name in EVALUATION_CODE:
        spec = find_spec(name.removesuffix(".py"))
        assert spec is not None and spec.origin is not None, f"Python comes with {name}"
        return Path(spec.origin).read_text(encoding="utf-8")
    if name == EVALUATION_MANUAL:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
