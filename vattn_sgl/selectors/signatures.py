"""What selectors `sign` and `hash` share: signatures of keys, compared by popcount and weighed by a calibrated line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattn_kernels import line, ops, signature
from vattn_kernels.sketch import Moments
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry, SideArguments, SideTensor
from vattn_sgl.selectors.calibrated import CalibratedSelector
from vattn_sgl.selectors.calibration import Calibration, CalibrationStore
from vattn_sgl.selectors.hash_weights import Nets


class SignatureSelector(CalibratedSelector):
    """Selector whose side data are signatures and the key's norm a token and KV head.

    Attributes
    ----------
    codes : torch.Tensor
        int32 ``[num_layers, num_slots, num_kv_heads, words]``.
    """

    angular: bool

    def __init__(
        self, settings: Settings, geometry: CacheGeometry, layer_ids: Sequence[int], key: str, nets: list[Nets]
    ) -> None:
        g = geometry
        self.nets = nets
        tables = line.LineTables.zeros(g.num_layers, g.num_kv_heads, g.head_dim, g.device)
        store = CalibrationStore(key, geometry, nets[0].bits, line.LineTables)
        super().__init__(settings, geometry, layer_ids, tables, Calibration(settings, geometry, store, self._line))
        self.codes = self.side["codes"]

    @staticmethod
    def signature_layout(geometry: CacheGeometry, words: int) -> tuple[SideTensor, ...]:
        """Signatures of ``words`` words, norm of the centred k, valid byte."""
        return (
            SideTensor("codes", (geometry.num_kv_heads, words), torch.int32),
            SideTensor("norms", (geometry.num_kv_heads, 1), torch.uint8),
            SideTensor("valid", (), torch.uint8),
        )

    def encode(self, layer: int, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Sign ``slots``; see `vattn_kernels.ops.encode_signature`."""
        nets, mean = self.nets[layer], self.tables.mean[layer]
        codes, norms, valid = (side[layer] for side in self.side.values())
        ops.encode_signature(k_cache, slots, mean, nets.key, nets.key_widths, codes, norms, valid, self.angular)

    def side_arguments(self, layer: int) -> SideArguments:
        """Signatures, norms, valid bytes, the queries' nets and the line."""
        nets, t = self.nets[layer], self.tables
        codes, norms, valid = (side[layer] for side in self.side.values())
        return codes, norms, valid, t.mean[layer], nets.query, t.line[layer], nets.query_widths

    def _line(self, moments: Moments, keys: torch.Tensor, queries: torch.Tensor) -> line.LineTables:
        return fit_line(self.nets, self.angular, self.geometry.scale, moments, queries, keys)


def fit_line(
    nets: list[Nets], angular: bool, sm_scale: float, moments: Moments, queries: torch.Tensor, keys: torch.Tensor
) -> line.LineTables:
    """Lines that weigh the signatures of given nets.

    Parameters
    ----------
    nets : list of Nets
        One a layer.
    angular : bool
        As in `vattn_kernels.signature.agreement`.
    sm_scale, moments, queries, keys
        As in `vattn_kernels.line.solve`.
    """
    heads = keys.shape[2]

    def features(
        layer: int, head: int, q: torch.Tensor, k: torch.Tensor, mean: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        here = nets[layer]
        query, key = (net.unflatten(0, (heads, -1))[head] for net in (here.query, here.key))
        widths = here.query_widths.tolist(), here.key_widths.tolist()
        return signature.sample_features(q, k, mean, query, key, *widths, angular, sm_scale)

    return line.solve(moments, queries, keys, sm_scale, features)
