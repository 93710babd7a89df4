"""Where this project keeps files between starts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Cache folder: ``$VATTN_CACHE``, or ``~/.cache/vattn-sgl``."""
    root = os.environ.get("VATTN_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "vattn-sgl"
