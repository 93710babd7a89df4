"""Exact attention of new tokens on a CPU.

SGLang's ``torch_native`` computes a request's whole query range again for every chunk; here only the new queries
attend, to the prefix and to themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Request:
    """One request of an extend batch.

    Attributes
    ----------
    start, stop : int
        Rows of its new tokens.
    slots : torch.Tensor
        int64 ``[prefix + new]`` cache slots by position.
    mask : torch.Tensor or None
        float32 ``[new, prefix + new]`` additive mask; None where a plain causal mask or none serves.
    causal : bool
        Whether torch's own causal mask applies (no prefix).
    """

    start: int
    stop: int
    slots: torch.Tensor
    mask: torch.Tensor | None
    causal: bool


class CpuPrefill:
    """Prefill of the backend on a CPU; one instance a process."""

    def build(self, forward_batch: Any, req_to_token: torch.Tensor) -> list[Request]:
        """Everything that the layers of one pass share.

        Parameters
        ----------
        forward_batch : ForwardBatch
            An extend batch.
        req_to_token : torch.Tensor
            int32 ``[max_requests, max_len]`` page table.

        Returns
        -------
        list of Request
        """
        pool_rows = forward_batch.req_pool_indices.tolist()
        requests = []
        start = 0
        prefixes, news = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        for row, prefix, new in zip(pool_rows, map(int, prefixes), map(int, news), strict=True):
            slots = req_to_token[row, : prefix + new].long()
            requests.append(Request(start, start + new, slots, causal_mask(prefix, new), prefix == 0 and new > 1))
            start += new
        return requests

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: list[Request],
        sm_scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attention of all new tokens of a layer.

        Parameters
        ----------
        q : torch.Tensor
            ``[num_tokens, num_qo_heads, head_dim]``.
        k_cache, v_cache : torch.Tensor
            ``[num_slots, num_kv_heads, head_dim]``, the new tokens stored already.
        metadata : list of Request
            From `build`.
        sm_scale : float
            Factor of the logits.
        out : torch.Tensor
            ``[num_tokens, num_qo_heads, head_dim]``, written.
        """
        group = q.shape[1] // k_cache.shape[1]
        for request in metadata:
            rows = slice(request.start, request.stop)
            k = _heads(k_cache, request.slots, group)
            v = _heads(v_cache, request.slots, group)
            mask = None if request.mask is None else request.mask.to(q.dtype)
            attended = scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=request.causal, scale=sm_scale
            )
            out[rows] = attended[0].transpose(0, 1)


def causal_mask(prefix: int, new: int) -> torch.Tensor | None:
    """Additive mask float32 ``[new, prefix + new]`` of queries behind a prefix, or None where none is needed."""
    if prefix == 0 or new == 1:
        return None
    return torch.full((new, prefix + new), float("-inf")).triu_(prefix + 1)


def _heads(cache: torch.Tensor, slots: torch.Tensor, group: int) -> torch.Tensor:
    """``[1, num_qo_heads, tokens, head_dim]`` of a request; a view over the group, not a copy."""
    rows = cache[slots].transpose(0, 1)  # [H, N, D]
    return rows[:, None].expand(-1, group, -1, -1).reshape(1, -1, *rows.shape[1:]) if group > 1 else rows[None]
