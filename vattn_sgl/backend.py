"""SGLang attention backend ``vattention``: decode with a certified error, prefill by another backend."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from vattn_kernels import ops
from vattn_sgl import compat, control, prefill, support, telemetry
from vattn_sgl.config import Settings, load_settings
from vattn_sgl.selectors import REGISTRY, CacheGeometry, Selector
from vattn_sgl.selectors.calibration import model_key

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class VAttentionBackend(AttentionBackend):
    """Decode through ``torch.ops.vattn.decode``; see ``architecture.md`` for the way a step takes.

    The page table is copied into a buffer of our own before the layers run, because the scheduler may overwrite
    ``req_to_token`` during a step (``sglang.md``, write-after-read).

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner; its pools must exist.
    settings : Settings
        In force at start.

    Raises
    ------
    vattn_sgl.support.Unsupported
        If the model or the server's arguments cannot be served; lists every reason.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: ModelRunner, settings: Settings) -> None:
        super().__init__()
        support.check(model_runner)
        self.settings = settings
        self.device = torch.device(model_runner.device)
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        pool = self.token_to_kv_pool
        self.first_layer = pool.start_layer or 0
        k_cache = pool.get_key_buffer(self.first_layer)
        slots, kv_heads, head_dim = k_cache.shape
        query_heads, sm_scale = compat.query_geometry(model_runner)
        geometry = CacheGeometry(
            pool.layer_num, slots, kv_heads, head_dim, self.device, k_cache.dtype, query_heads, sm_scale
        )
        layer_ids = range(self.first_layer, self.first_layer + pool.layer_num)
        key = model_key(model_runner.model_config.model_path)
        self.selector: Selector = REGISTRY[settings.selector](settings, geometry, layer_ids, key)
        compat.watch_foreign_writes(pool, self.selector.invalidate)
        self.control = control.create(settings, geometry.num_layers, self.device)
        self.telemetry = telemetry.Telemetry(model_runner, settings, geometry, self.selector, self.control)
        self.prefill = prefill.create(model_runner, settings)

        max_batch = self.req_to_token_pool.size
        self.kv_indices = torch.zeros(max_batch, self.req_to_token.shape[1], dtype=torch.int32, device=self.device)
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int64, device=self.device)
        top_k = settings.top_k
        self.step_settings: dict[str, Any] = {
            "seed": settings.seed,
            "sampler": settings.sampler,
            "target": settings.target,
            "selector": self.selector.name,
            "sink": settings.sink,
            "window": settings.window,
            "dense_below": settings.dense_below,
            "top_k_count": top_k if isinstance(top_k, int) else -1,
            "top_k_share": 0.0 if isinstance(top_k, int) else top_k,
            "pilot": settings.pilot,
            "pilot_min": settings.pilot_min,
            "cap": settings.cap,
            "floor": settings.floor,
            "group_score": settings.group_score,
            "audit_rate": settings.audit_rate,
        }

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Between batches: apply staged parameters, advance calibration, snapshot the page table."""
        self.control.apply_staged()
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        lengths = compat.host_seq_lens(forward_batch)
        num_tokens = sum(forward_batch.extend_seq_lens_cpu) if mode.is_extend() else len(lengths)
        self.selector.begin_forward(max(lengths), num_tokens, self.token_to_kv_pool)
        self.telemetry.begin_forward()
        if mode.is_extend():
            self.prefill.begin(forward_batch)
            return
        batch = forward_batch.batch_size
        torch.index_select(self.req_to_token, 0, forward_batch.req_pool_indices, out=self.kv_indices[:batch])
        self.seq_lens[:batch].copy_(forward_batch.seq_lens)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Exact attention of new tokens; their slots are then indexed.

        Parameters
        ----------
        q : torch.Tensor
            ``[num_tokens, num_qo_heads * head_dim]``.
        k, v : torch.Tensor
            ``[num_tokens, num_kv_heads, head_dim]`` or flat.
        layer : RadixAttention
            SGLang's layer.
        forward_batch : ForwardBatch
            The batch.
        save_kv_cache : bool
            False when a fused kernel has stored K and V already.

        Returns
        -------
        torch.Tensor
            ``[num_tokens, num_qo_heads * head_dim]``.
        """
        q = self._write(q, k, v, layer, forward_batch, save_kv_cache)
        return self.prefill.attend(q, layer, forward_batch)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One token a request, by the op; arguments as in `forward_extend`."""
        q = self._write(q, k, v, layer, forward_batch, save_kv_cache)
        index = layer.layer_id - self.first_layer
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        batch = q.shape[0]
        out = torch.empty_like(q)
        stats = torch.empty(batch, q.shape[1], len(ops.STATS), dtype=torch.float32, device=q.device)
        ops.decode(
            q,
            k_cache,
            v_cache,
            self.kv_indices[:batch],
            self.seq_lens[:batch],
            *self.selector.arguments(index),
            self.control.params[index],
            self.selector.covered,
            *self.telemetry.edges,
            out,
            stats,
            self.telemetry.counters[index],
            self.telemetry.offsets,
            sm_scale=layer.scaling,
            layer_id=layer.layer_id,
            **self.step_settings,
        )
        return out.view(batch, -1)

    def _write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()
        if save_kv_cache and k is not None:
            compat.write_kv(self.token_to_kv_pool, layer, forward_batch.out_cache_loc, k, v)
        index = layer.layer_id - self.first_layer
        self.selector.after_write(index, q, forward_batch.out_cache_loc, self.token_to_kv_pool)
        return q

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a padded row."""
        return 1


def create(model_runner: ModelRunner) -> VAttentionBackend:
    """Factory registered with SGLang: reads the settings and builds the backend."""
    return VAttentionBackend(model_runner, load_settings())
