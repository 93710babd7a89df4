"""HashAttention (arXiv 2412.14468): signatures by the nets that its authors learn for a model."""

from __future__ import annotations

from collections.abc import Sequence

from vattn_sgl.config import Settings
from vattn_sgl.selectors import hash_weights
from vattn_sgl.selectors.base import CacheGeometry, SideTensor
from vattn_sgl.selectors.signatures import SignatureSelector


class HashSelector(SignatureSelector):
    """Learned signatures (HashAttention, arXiv 2412.14468) from the file that ``hash_weights`` names."""

    name = "hash"
    angular = False

    def __init__(self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str) -> None:
        assert settings.hash_weights is not None
        weights = hash_weights.load(settings.hash_weights)
        nets = hash_weights.nets(weights, settings.hash_weights, geometry, layer_ids)
        key = f"{model_key}-hash-{hash_weights.digest(settings.hash_weights)}"
        super().__init__(settings, geometry, layer_ids, key, nets)

    @classmethod
    def layout(cls, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """One signature a KV head, or one a query head, as the file has key nets."""
        assert settings.hash_weights is not None
        words = hash_weights.words_per_kv_head(settings.hash_weights, geometry.num_kv_heads)
        return cls.signature_layout(geometry, words)
