"""Random hyperplanes: the baseline without training."""

from __future__ import annotations

from collections.abc import Sequence

from vattn_kernels import signature
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry, SideTensor
from vattn_sgl.selectors.hash_weights import Nets
from vattn_sgl.selectors.signatures import SignatureSelector

PROJECTION_SEED = 0


class SignSelector(SignatureSelector):
    """Signs of a fixed random projection of the centred key: the baseline without training (Charikar 2002)."""

    name = "sign"
    angular = True

    def __init__(self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], model_key: str) -> None:
        heads = geometry.num_qo_heads or geometry.num_kv_heads
        bits = settings.sketch_bits
        query, widths = signature.random_nets(PROJECTION_SEED, geometry.head_dim, bits, heads)
        key = query[: geometry.num_kv_heads].clone()
        nets = Nets(query, key, widths, widths).to(geometry.device)
        super().__init__(settings, geometry, layer_ids, f"{model_key}-sign", [nets] * geometry.num_layers)

    @classmethod
    def layout(cls, settings: Settings, geometry: CacheGeometry) -> tuple[SideTensor, ...]:
        """One signature of ``sketch_bits`` bits."""
        return cls.signature_layout(geometry, settings.sketch_bits // signature.WORD_BITS)
