"""Runs the cases in Triton's interpreter: Triton reads at import whether it interprets, so that takes new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("interpreted.py", "interpreted_selectors.py", "interpreted_uniform.py", "emulated.py")


@pytest.fixture(scope="module")
def runs():
    """All of them at once, as each keeps one core busy for minutes."""
    started = {
        cases: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", Path(__file__).with_name(cases)],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for cases in CASES
    }
    yield started
    for run in started.values():
        run.kill()


@pytest.mark.parametrize("cases", CASES)
def test_kernels_agree_with_float64_in_the_interpreter(cases, runs):
    output, _ = runs[cases].communicate()
    assert runs[cases].returncode == 0, output[-8000:]
    assert " passed" in output and "skipped" not in output
