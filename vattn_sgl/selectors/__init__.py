"""Selectors, one a file; `REGISTRY` is the only list of them."""

from __future__ import annotations

from vattn_sgl.selectors.base import CacheGeometry, Selector, SelectorFactory, SideTensor, bytes_per_token
from vattn_sgl.selectors.hash import HashSelector
from vattn_sgl.selectors.oracle import OracleSelector
from vattn_sgl.selectors.quest import QuestSelector
from vattn_sgl.selectors.sign import SignSelector
from vattn_sgl.selectors.sketch import SketchSelector

REGISTRY: dict[str, SelectorFactory] = {
    "sketch": SketchSelector,
    "oracle": OracleSelector,
    "quest": QuestSelector,
    "sign": SignSelector,
    "hash": HashSelector,
}

__all__ = ["REGISTRY", "CacheGeometry", "Selector", "SelectorFactory", "SideTensor", "bytes_per_token"]
