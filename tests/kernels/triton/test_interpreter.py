"""Runs the cases in Triton's interpreter: Triton reads at import whether it interprets, so that takes a new process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("interpreted.py", "interpreted_selectors.py", "interpreted_uniform.py", "emulated.py")


@pytest.mark.parametrize("cases", CASES)
def test_kernels_agree_with_float64_in_the_interpreter(cases):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", Path(__file__).with_name(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
