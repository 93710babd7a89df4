"""Every difference between the supported versions of SGLang, 0.5.17 to 0.5.x, in one place."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from vattn_kernels.checks import FP8_DTYPES
from vattn_kernels.rope import Rope

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from vattn_sgl.selectors.base import CacheGeometry

# Other classes of SGLang rotate by more than the token's position, or differently from request to request.
_PLAIN_ROPES = (
    "RotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
)
# SGLang lists the few of these that it serves; others would be run by transformers as if they generated.
_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]")
MINIMUM, BELOW = (0, 5, 17), (0, 6)
logger = logging.getLogger(__name__)


def version_tuple(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, ``0.5.20.post1`` -> ``(0, 5, 20)``."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def cpu_platform_base() -> type:
    """SGLang's CPU platform; 0.5.17 has only its parts."""
    try:
        from sglang.srt.platforms.cpu import CpuSRTPlatform
    except ImportError:
        from sglang.srt.platforms.interface import SRTPlatform

        return SRTPlatform
    return CpuSRTPlatform


def paged_allocator_class() -> type:
    """The paged allocator."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

    return PagedTokenToKVPoolAllocator


@functools.cache
def _write_location() -> Callable[[torch.Tensor], Any]:
    from sglang.srt.mem_cache import memory_pool

    location = getattr(memory_pool, "KVWriteLoc", None)
    return (lambda slots: slots) if location is None else (lambda slots: location(slots, None))


def write_kv(pool: Any, layer: RadixAttention, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store K and V of new tokens.

    Parameters
    ----------
    pool : KVCache
        SGLang's pool.
    layer : RadixAttention
        SGLang's layer.
    slots : torch.Tensor
        int64 ``[num_tokens]``.
    k, v : torch.Tensor
        ``[num_tokens, num_kv_heads * head_dim]`` or with heads apart.
    """
    k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
    v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
    if pool.dtype in FP8_DTYPES and layer.k_scale is not None:
        # The pool would divide in place, and prefill reads K and V afterwards.
        k, v = k / layer.k_scale, v / layer.v_scale
    pool.set_kv_buffer(layer, _write_location()(slots), k, v)


def kv_scales(model_runner: Any) -> tuple[tuple[float, float], ...]:
    """What K and V of each layer are multiplied by when they are read from an fp8 pool: `write_kv` divides by it.

    Waits for the device, so it is asked once at start.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner with its pools built.

    Returns
    -------
    tuple of (float, float)
        One a layer of this rank, 1 where the model has no scales; empty for pools of other dtypes, which have none.
    """
    pool = model_runner.token_to_kv_pool
    if pool.dtype not in FP8_DTYPES:
        return ()
    first = pool.start_layer or 0
    scales = dict.fromkeys(range(first, first + pool.layer_num), (1.0, 1.0))
    for layer in _attention_layers(getattr(model_runner, "model", None)):
        if layer.k_scale is not None and layer.layer_id in scales:
            scales[layer.layer_id] = float(layer.k_scale), float(layer.v_scale)
    return tuple(scales.values())


def watch_foreign_writes(pool: Any, invalidate: Callable[[torch.Tensor], None]) -> None:
    """Call ``invalidate(slots)`` when SGLang writes slots without going through a backend.

    Parameters
    ----------
    pool : KVCache
        SGLang's pool; its methods ``move_kv_cache(target, source)`` and ``load_cpu_copy(copy, slots)`` are wrapped.
    invalidate : callable
        Receives the slots written.
    """
    for name, position, keyword in (("move_kv_cache", 0, "tgt_loc"), ("load_cpu_copy", 1, "indices")):
        original = getattr(pool, name, None)
        if original is None:
            continue

        setattr(pool, name, _telling(original, position, keyword, invalidate))


def _telling(original: Any, position: int, keyword: str, told: Callable[[torch.Tensor], None]) -> Any:
    """A method that tells one of its arguments after the fact."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        told(args[position] if len(args) > position else kwargs[keyword])
        return result

    return wrapped


def longest_context(forward_batch: ForwardBatch) -> int:
    """Longest context of a batch, the new tokens included, without waiting for a device; 0 if only that knows.

    Parameters
    ----------
    forward_batch : ForwardBatch
        The batch.
    """
    if forward_batch.forward_mode.is_extend():
        pairs = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
        return max(int(prefix) + int(new) for prefix, new in pairs)
    lengths = forward_batch.seq_lens_cpu
    if lengths is None:
        lengths = forward_batch.seq_lens
    return int(lengths.max()) if lengths.device.type == "cpu" else 0


def decode_seq_lens(forward_batch: ForwardBatch) -> torch.Tensor:
    """Contexts of a decode batch on the host, the new tokens included, int64 ``[batch]``; empty if only a device knows.

    Parameters
    ----------
    forward_batch : ForwardBatch
        The batch.
    """
    lengths = forward_batch.seq_lens_cpu
    return torch.empty(0, dtype=torch.int64) if lengths is None else lengths


def new_tokens(forward_batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and positions of the tokens that a pass computes, int64 ``[num_tokens]``.

    Parameters
    ----------
    forward_batch : ForwardBatch
        The batch.
    """
    slots = forward_batch.out_cache_loc
    # Within a padded prefill graph 0.5.17 narrows the slots alone.
    return slots, forward_batch.positions[: slots.shape[0]]


def watch_captures(model_runner: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter a context while SGLang captures its CUDA graphs at start.

    SGLang's own flag does not tell: it is unset while a prefill graph is captured and set when one is replayed.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner; its method ``init_cuda_graphs`` is wrapped.
    context : callable
        Makes the context.
    """
    original = getattr(model_runner, "init_cuda_graphs", None)
    if original is None:
        return

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    model_runner.init_cuda_graphs = wrapped


class DecodeGraphs:
    """Two runners of decode graphs in the place of one; a batch says which of them replays it.

    Parameters
    ----------
    first, second : DecodeCudaGraphRunner
        SGLang's runners.
    takes_second : callable
        Whether a ``ForwardBatch`` goes to ``second``.
    """

    def __init__(self, first: Any, second: Any, takes_second: Callable[[Any], bool]) -> None:
        self.first, self.second, self.takes_second = first, second, takes_second

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first, name)

    def _runner(self, forward_batch: ForwardBatch) -> Any:
        return self.second if self.takes_second(forward_batch) else self.first

    def can_run_graph(self, forward_batch: ForwardBatch) -> bool:
        """The runner's."""
        return bool(self._runner(forward_batch).can_run_graph(forward_batch))

    def execute(self, forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> Any:
        """The runner's."""
        return self._runner(forward_batch).execute(forward_batch, *args, **kwargs)


def add_decode_graphs(model_runner: Any, backend: Any, takes: Callable[[Any], bool]) -> None:
    """Capture decode graphs with a second attention backend too, once SGLang has captured its own.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner; its method ``init_cuda_graphs`` is wrapped.
    backend : AttentionBackend
        What the second graphs run.
    takes : callable
        Whether a ``ForwardBatch`` goes to the second graphs.
    """
    original = getattr(model_runner, "init_cuda_graphs", None)
    if original is None:
        return

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        first = model_runner.decode_cuda_graph_runner
        if first is not None:
            logger.info("vattention: capturing decode graphs of batches that are read whole")
            # Runners share these, and a dummy batch takes its contexts from them.
            for lengths in (first.buffers.seq_lens, first.buffers.seq_lens_cpu):
                lengths.fill_(backend.get_cuda_graph_seq_len_fill_value())
            second = type(first)(model_runner, attn_backend=backend)
            model_runner.decode_cuda_graph_runner = DecodeGraphs(first, second, takes)
        return result

    model_runner.init_cuda_graphs = wrapped


def largest_decode_graph(server_args: Any) -> int | None:
    """Requests of the largest decode graph that will be captured, or None without graphs.

    Parameters
    ----------
    server_args : ServerArgs
        SGLang's arguments.
    """
    decode = server_args.cuda_graph_config.decode
    return None if decode.backend == "disabled" or not decode.bs else max(decode.bs)


def default_dtype(config: Any) -> torch.dtype:
    """Dtype that SGLang serves a model in without ``--dtype``, which is float16 for most float32 models.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the model's text part.
    """
    from sglang.srt.configs.model_config import _get_and_verify_dtype

    dtype: torch.dtype = _get_and_verify_dtype(config, "auto")
    return dtype


def generates(architectures: list[str]) -> bool:
    """Whether a model has a head that generates, by the names of its architectures.

    Parameters
    ----------
    architectures : list of str
        Of ``config.json``.
    """
    from sglang.srt.configs.model_config import is_generation_model

    return is_generation_model(architectures) and not any(_OTHER_HEAD.search(name) for name in architectures)


def knows(config: Any) -> bool:
    """Whether SGLang finds a class for a model: its own, transformers' or one that comes with the model.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the model; names architectures.
    """
    import transformers

    if "AutoModel" in (getattr(config, "auto_map", None) or {}):
        return True
    if any(hasattr(transformers, name) for name in config.architectures):
        return True
    # Last, because it imports every model of SGLang.
    from sglang.srt.models.registry import ModelRegistry

    return not ModelRegistry.get_supported_archs().isdisjoint(config.architectures)


def query_geometry(model_runner: Any) -> tuple[int | None, float | None]:
    """Query heads on this rank and the factor of the logits, from the model's first attention layer.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner.

    Returns
    -------
    int or None, float or None
        None without a model.
    """
    for layer in _attention_layers(getattr(model_runner, "model", None)):
        return int(layer.tp_q_head_num), float(layer.scaling)
    return None, None


def _attention_layers(model: Any) -> Iterator[Any]:
    """SGLang's attention layers of a model; none without a model."""
    for layer in model.modules() if isinstance(model, torch.nn.Module) else ():
        if type(layer).__name__ == "RadixAttention":
            yield layer


def rope(model: Any, head_dim: int) -> Rope | None:
    """Rotation that all attention layers share, or None where it is not one known rotation per position.

    Parameters
    ----------
    model : torch.nn.Module or None
        SGLang's model; a layer's rotation is ``rotary_emb`` of the module that holds its ``RadixAttention``.
    head_dim : int
        Of K.
    """
    found: set[Any] = set()
    for name, layer in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if type(layer).__name__ == "RadixAttention":
            found.add(getattr(model.get_submodule(name.rpartition(".")[0]), "rotary_emb", None))
    if len(found) != 1:
        return None
    (rotation,) = found
    if type(rotation).__name__ not in _PLAIN_ROPES:
        return None
    return Rope.from_cache(rotation.cos_sin_cache, head_dim, rotation.is_neox_style)


def side_geometry(configurator: Any, num_layers: int) -> CacheGeometry:
    """Geometry of the pool that SGLang is about to size, with no slots yet.

    Parameters
    ----------
    configurator : KVCacheConfigurator
        SGLang's object of that name.
    num_layers : int
        Layers on this rank.
    """
    from sglang.srt.runtime_context import get_parallel

    from vattn_sgl.selectors.base import CacheGeometry

    model, ranks = configurator.model_config, get_parallel().attn_tp_size
    heads = model.get_num_kv_heads(ranks)
    query_heads = model.num_attention_heads // ranks
    cpu = torch.device("cpu")
    return CacheGeometry(num_layers, 0, heads, model.head_dim, cpu, configurator.kv_cache_dtype, query_heads)


def metric_labels(model_runner: Any) -> dict[str, str]:
    """SGLang's labels of its own scheduler metrics.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner.
    """
    args = model_runner.server_args
    parallel = getattr(model_runner, "ps", model_runner)
    labels = {
        "model_name": args.served_model_name or args.model_path,
        "engine_type": {"prefill": "prefill", "decode": "decode"}.get(args.disaggregation_mode, "unified"),
        "tp_rank": str(getattr(parallel, "tp_rank", 0)),
        "pp_rank": str(getattr(parallel, "pp_rank", 0)),
        "moe_ep_rank": str(getattr(parallel, "moe_ep_rank", 0)),
    }
    dp_rank = getattr(parallel, "dp_rank", None)
    return labels if dp_rank is None else labels | {"dp_rank": str(dp_rank)}
