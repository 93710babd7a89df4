"""Who computes new tokens: our own prefill on a CPU, or a backend of SGLang on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from vattn_sgl.config import Settings
from vattn_sgl.cpu.prefill import CpuPrefill

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


# Unlike flashinfer it needs no minutes of compiling.
GPU_BACKEND = "triton"


class BackendError(ValueError):
    """The setting ``prefill_backend`` or ``dense_backend`` names no backend of SGLang."""


class Prefill(Protocol):
    """Exact attention of new tokens whose K and V stand in the pool already."""

    def begin(self, forward_batch: ForwardBatch) -> None:
        """Prepare one extend pass; called before its layers."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Outputs ``[num_tokens, num_qo_heads * head_dim]`` of queries ``[num_tokens, num_qo_heads, head_dim]``.

        K and V of the new tokens are SGLang's arguments, which stand in the pool too.
        """
        ...


def check_name(setting: str, name: str) -> None:
    """Refuse a backend that SGLang does not have.

    Parameters
    ----------
    setting, name : str
        Of the setting, and its value.

    Raises
    ------
    BackendError
        With the names that there are.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if name not in ATTENTION_BACKENDS or name == "vattention":
        known = ", ".join(sorted(set(ATTENTION_BACKENDS) - {"vattention"}))
        raise BackendError(f"{setting} {name!r} is not a backend of SGLang; known are {known}")


def delegate(model_runner: ModelRunner, setting: str, name: str) -> Any:
    """Another attention backend of SGLang on this runner's pools.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner.
    setting, name : str
        Of the setting that asks for it, and its value.

    Raises
    ------
    BackendError
        If SGLang has no such backend.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    check_name(setting, name)
    return ATTENTION_BACKENDS[name](model_runner)


class OwnPrefill:
    """`vattn_sgl.cpu.prefill` on SGLang's pools."""

    def __init__(self, model_runner: ModelRunner) -> None:
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.pool = model_runner.token_to_kv_pool
        self.cpu = CpuPrefill()
        self.metadata: Any = None

    def begin(self, forward_batch: ForwardBatch) -> None:
        """Slots and masks, shared by the layers."""
        self.metadata = self.cpu.build(forward_batch, self.req_to_token)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """See `Prefill.attend`."""
        k_cache, v_cache = self.pool.get_kv_buffer(layer.layer_id)
        out = torch.empty_like(q)
        self.cpu.run(q, k_cache, v_cache, self.metadata, layer.scaling, out)
        return out.view(q.shape[0], -1)


class DelegatedPrefill:
    """Another attention backend of SGLang."""

    def __init__(self, model_runner: ModelRunner, name: str) -> None:
        self.backend = delegate(model_runner, "prefill_backend", name)

    def begin(self, forward_batch: ForwardBatch) -> None:
        """The backend's own metadata."""
        self.backend.init_forward_metadata(forward_batch)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """See `Prefill.attend`."""
        flat = q.view(q.shape[0], -1)
        out: torch.Tensor = self.backend.forward_extend(flat, k, v, layer, forward_batch, save_kv_cache=False)
        return out


def create(model_runner: ModelRunner, settings: Settings) -> Prefill:
    """The prefill that the settings ask for.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner.
    settings : Settings
        ``prefill_backend`` None takes ours on a CPU and `GPU_BACKEND` on a GPU.

    Raises
    ------
    BackendError
        If SGLang has no such backend.
    """
    on_gpu = torch.device(model_runner.device).type == "cuda"
    name = settings.prefill_backend or (GPU_BACKEND if on_gpu else None)
    return OwnPrefill(model_runner) if name is None else DelegatedPrefill(model_runner, name)
