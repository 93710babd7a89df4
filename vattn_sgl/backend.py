"""SGLang attention backend ``vattention``: decode with a certified error, prefill by another backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from vattn_kernels import ops
from vattn_sgl import compat, control, prefill, support, telemetry
from vattn_sgl.config import Settings, load_settings
from vattn_sgl.selectors import REGISTRY, CacheGeometry, Selector
from vattn_sgl.selectors.calibration import model_key
from vattn_sgl.whole import WholeDecode

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

PADDING = 64
# Eager batches are cut to this where no graph says how large a batch will be.
EAGER_BATCH = 64


@dataclass
class Rows:
    """What the layers of a decode step know about its requests.

    Attributes
    ----------
    kv_indices : torch.Tensor
        int32 ``[batch, max_len]``, slots by position.
    seq_lens : torch.Tensor
        int64 ``[batch]``, the new token included; 0 is a padded row.
    state_rows : torch.Tensor
        int64 ``[batch]``, row of each request in ``req_to_token`` and in the backend's state.
    """

    kv_indices: torch.Tensor
    seq_lens: torch.Tensor
    state_rows: torch.Tensor

    def part(self, first: int, last: int) -> Rows:
        """Requests ``first`` to ``last - 1``, as views."""
        return Rows(self.kv_indices[first:last], self.seq_lens[first:last], self.state_rows[first:last])


class VAttentionBackend(AttentionBackend):
    """Decode through ``torch.ops.vattn.decode``; see ``architecture.md`` for the way a step takes.

    The page table is copied into a tensor of our own before the layers run, because the scheduler may overwrite
    ``req_to_token`` during a step (``sglang.md``, write-after-read). A CUDA graph reads the copy at a fixed address; it
    is made before the replay, which is early enough for every version of SGLang.

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

    def __init__(self, model_runner: ModelRunner, settings: Settings) -> None:
        super().__init__()
        support.check(model_runner, settings)
        self.settings = settings
        self.device = torch.device(model_runner.device)
        self.on_gpu = self.device.type == "cuda"
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        pool = self.token_to_kv_pool
        self.first_layer = pool.start_layer or 0
        k_cache = pool.get_key_buffer(self.first_layer)
        slots, kv_heads, head_dim = k_cache.shape
        query_heads, sm_scale = compat.query_geometry(model_runner)
        rope = compat.rope(getattr(model_runner, "model", None), head_dim)
        shape = (pool.layer_num, slots, kv_heads, head_dim)
        scales = compat.kv_scales(model_runner)
        geometry = CacheGeometry(*shape, self.device, k_cache.dtype, query_heads, sm_scale, rope, scales)
        self.geometry = geometry
        layer_ids = range(self.first_layer, self.first_layer + pool.layer_num)
        key = model_key(model_runner.model_config.model_path)
        self.selector: Selector = REGISTRY[settings.selector](settings, geometry, layer_ids, key)
        compat.watch_foreign_writes(pool, self.selector.invalidate)
        self.control = control.create(settings, geometry.num_layers, self.device)
        self.control.set_dimensions(self.selector.dimensions)
        self.telemetry = telemetry.Telemetry(model_runner, settings, geometry, self.selector, self.control)
        self.prefill = prefill.create(model_runner, settings)
        self.capturing = False
        self.whole = WholeDecode(model_runner, settings, self) if self.on_gpu else None
        self.is_whole = False
        compat.watch_captures(model_runner, self._capture)

        num_rows, width = self.req_to_token.shape
        self.max_len = min(width, slots)
        self.max_batch = self.req_to_token_pool.size
        self.state: torch.Tensor | None = None
        self.rows: Rows | None = None
        self.graph_rows: Rows | None = None
        if self.on_gpu:
            graph = compat.largest_decode_graph(model_runner.server_args)
            self.max_batch = min(self.max_batch, EAGER_BATCH if graph is None else graph)
            heads = model_runner.model_config.num_attention_heads if query_heads is None else query_heads
            ops.reserve(self.device, self.max_batch, self.max_len, heads, kv_heads, head_dim, settings.sampler)
            self.state = torch.zeros(geometry.num_layers, num_rows, heads, ops.STATE_WIDTH, device=self.device)
        self.step_settings: dict[str, Any] = {
            "seed": settings.seed,
            "sampler": settings.sampler,
            "target": settings.target,
            "selector": self.selector.name,
            "sink": settings.sink,
            "window": settings.window,
            "dense_below": settings.dense_below,
            **settings.top_k_arguments,
            "pilot": settings.pilot,
            "pilot_min": settings.pilot_min,
            "cap": settings.cap,
            "floor": settings.floor,
            "group_score": settings.group_score,
            "audit_rate": settings.audit_rate,
        }

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Before an eager batch: see `begin`; then hand over to prefill or snapshot the page table."""
        longest = self.begin(forward_batch)
        mode, requests = forward_batch.forward_mode, forward_batch.req_pool_indices
        if mode.is_idle():
            return
        if mode.is_extend():
            if self.state is not None:
                # Another request may have had the row before.
                self.state.index_fill_(1, requests.long(), 0.0)
            self.prefill.begin(forward_batch)
            return
        self.is_whole = self.whole is not None and self.whole.reads(forward_batch)
        if self.whole is not None and self.is_whole:
            self.whole.init_forward_metadata(forward_batch)
            return
        width = min(self.max_len, -(-longest // PADDING) * PADDING) or self.max_len
        table = self.req_to_token[:, :width].index_select(0, requests)
        self.rows = Rows(table, forward_batch.seq_lens.to(torch.int64, copy=True), requests.to(torch.int64, copy=True))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Tensors that captured graphs read, for up to ``max_bs`` requests."""
        self.graph_rows = Rows(
            torch.zeros(max_bs, self.max_len, dtype=torch.int32, device=self.device),
            torch.zeros(max_bs, dtype=torch.int64, device=self.device),
            torch.zeros(max_bs, dtype=torch.int64, device=self.device),
        )

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a decode graph is captured or replayed: see `begin`; then snapshot the page table in place."""
        self.begin(forward_batch, in_capture)
        assert self.graph_rows is not None, "init_cuda_graph_state comes first"
        self.is_whole = False
        self.rows = self.graph_rows.part(0, forward_batch.batch_size)
        requests = forward_batch.req_pool_indices
        # All max_len columns, 8 MB a step for 16 x 128K: the lengths are not known here without waiting for the device.
        torch.index_select(self.req_to_token[:, : self.max_len], 0, requests, out=self.rows.kv_indices)
        self.rows.seq_lens.copy_(forward_batch.seq_lens)
        self.rows.state_rows.copy_(requests)

    @contextmanager
    def _capture(self) -> Iterator[None]:
        """While SGLang captures graphs: its batches are dummies, and a read of the counters would break a capture."""
        self.capturing = True
        try:
            with self.telemetry.collector.paused():
                yield
        finally:
            self.capturing = False

    def begin(self, forward_batch: ForwardBatch, in_capture: bool = False) -> int:
        """Between batches: apply staged parameters and advance calibration; the longest context, or 0 if not known."""
        self.control.apply_staged()
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return 0
        if in_capture or self.capturing:
            self.selector.begin_forward(0, 0, self.token_to_kv_pool)
            return 0
        longest = compat.longest_context(forward_batch)
        # Decode steps are not observed: it would slow each of them, and a graph's cannot be.
        num_tokens = sum(forward_batch.extend_seq_lens_cpu) if mode.is_extend() else 0
        self.selector.begin_forward(longest, num_tokens, self.token_to_kv_pool)
        self.control.set_dimensions(self.selector.dimensions)
        self.telemetry.begin_forward()
        return longest

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
        q = self.write(q, k, v, layer, forward_batch, save_kv_cache)
        return self.prefill.attend(q, k, v, layer, forward_batch)

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
        if self.whole is not None and self.is_whole:
            return self.whole.forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        q = self.write(q, k, v, layer, forward_batch, save_kv_cache)
        index = layer.layer_id - self.first_layer
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        batch = q.shape[0]
        out = torch.empty_like(q)
        stats = torch.empty(batch, q.shape[1], len(ops.STATS), dtype=torch.float32, device=q.device)
        k_scale, v_scale = self.geometry.scales_of(index)
        assert self.rows is not None, "a metadata call comes first"
        for first in range(0, batch, self.max_batch):
            last = min(first + self.max_batch, batch)
            rows = self.rows.part(first, last)
            ops.decode(
                q[first:last],
                k_cache,
                v_cache,
                rows.kv_indices,
                rows.seq_lens,
                *self.selector.arguments(index),
                self.control.params[index],
                self.selector.covered,
                *self.telemetry.edges,
                out[first:last],
                stats[first:last],
                self.telemetry.counters[index],
                self.telemetry.offsets,
                sm_scale=layer.scaling,
                layer_id=layer.layer_id,
                state=None if self.state is None else self.state[index],
                state_rows=rows.state_rows,
                k_scale=k_scale,
                v_scale=v_scale,
                **self.step_settings,
            )
        return out.view(batch, -1)

    def write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """Store and index new tokens; arguments as in `forward_extend`.

        Returns
        -------
        torch.Tensor
            Queries ``[num_tokens, num_qo_heads, head_dim]``, contiguous.
        """
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()
        if save_kv_cache and k is not None:
            compat.write_kv(self.token_to_kv_pool, layer, forward_batch.out_cache_loc, k, v)
        index = layer.layer_id - self.first_layer
        slots, positions = compat.new_tokens(forward_batch)
        self.selector.after_write(index, q, slots, positions, self.token_to_kv_pool)
        return q

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a padded row: 0, which the op neither reads for nor counts."""
        return 0


def create(model_runner: ModelRunner) -> VAttentionBackend:
    """Factory registered with SGLang: reads the settings and builds the backend."""
    return VAttentionBackend(model_runner, load_settings())
