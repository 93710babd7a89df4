"""What the tests of the plugin share."""

from __future__ import annotations

import pytest

from vattn_sgl import control


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own, no settings from outside, no control left by another test."""
    import os

    for name in os.environ:
        if name.startswith("VATTN_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VATTN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(control, "_current", None)
