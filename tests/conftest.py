"""Rules for every test."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, unless TEST_GPU_REQUIRED says that there is one."""
    if torch.cuda.is_available() or os.environ.get("TEST_GPU_REQUIRED"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
