"""Fixtures of the telemetry tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest


@pytest.fixture
def promtool() -> Callable[..., str]:
    """Runs promtool with the given arguments and returns what it printed; an error of its own fails the test."""
    binary = shutil.which("promtool")
    assert binary, "promtool is not installed: run `apt-get install prometheus`, which brings it"

    def run(*arguments: object) -> str:
        done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
