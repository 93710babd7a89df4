"""Decode on a GPU of batches whose contexts are all read whole: by a dense backend of SGLang, in graphs of its own."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from vattn_sgl import compat
from vattn_sgl.prefill import delegate

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from vattn_sgl.backend import VAttentionBackend
    from vattn_sgl.config import Settings


def default_backend() -> str:
    """The fastest dense decode that is installed."""
    return "flashinfer" if importlib.util.find_spec("flashinfer") else "triton"


class WholeDecode(AttentionBackend):
    """What ``vattention`` does in a decode step, with the attention computed by a dense backend.

    Our kernels serve such contexts too, beside longer ones; a batch that has no longer ones need not pay for sampling.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner.
    settings : Settings
        ``dense_backend`` None takes `default_backend`.
    ours : VAttentionBackend
        Stores K and V, indexes them, and counts.

    Raises
    ------
    vattn_sgl.prefill.BackendError
        If SGLang has no such backend.
    """

    def __init__(self, model_runner: ModelRunner, settings: Settings, ours: VAttentionBackend) -> None:
        super().__init__()
        self.ours = ours
        self.dense = delegate(model_runner, "dense_backend", settings.dense_backend or default_backend())
        compat.add_decode_graphs(model_runner, self, self.reads)

    def reads(self, forward_batch: ForwardBatch) -> bool:
        """Whether every context of a decode batch is read whole, by what the host knows."""
        n = compat.decode_seq_lens(forward_batch)
        covered, below = self.ours.selector.covered_positions(), self.ours.settings.dense_below
        return n.numel() > 0 and bool(((n < below) | (n > covered)).all())

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Before an eager batch; the caller has begun the step."""
        self._count(forward_batch)
        self.dense.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """The dense backend's."""
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed."""
        self.ours.begin(forward_batch, in_capture)
        if not in_capture:
            self._count(forward_batch)
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """The dense backend's."""
        self.dense.init_forward_metadata_in_graph(forward_batch)

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
        """One token a request; arguments as in `VAttentionBackend.forward_extend`."""
        q = self.ours.write(q, k, v, layer, forward_batch, save_kv_cache)
        out: torch.Tensor = self.dense.forward_decode(
            q.view(q.shape[0], -1), k, v, layer, forward_batch, save_kv_cache=False
        )
        return out

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The dense backend's."""
        return int(self.dense.get_cuda_graph_seq_len_fill_value())

    def _count(self, forward_batch: ForwardBatch) -> None:
        if not self.ours.capturing:
            self.ours.telemetry.count_whole(compat.decode_seq_lens(forward_batch))
