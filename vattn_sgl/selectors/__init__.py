"""Selectors, one a file; `REGISTRY` is the only list of them."""

from __future__ import annotations

from vattn_sgl.selectors.base import CacheGeometry, Selector, SelectorFactory
from vattn_sgl.selectors.oracle import OracleSelector
from vattn_sgl.selectors.sketch import SketchSelector

REGISTRY: dict[str, SelectorFactory] = {"sketch": SketchSelector, "oracle": OracleSelector}

__all__ = ["REGISTRY", "CacheGeometry", "Selector", "SelectorFactory"]
