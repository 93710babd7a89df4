"""What the backend cannot serve, with the reason and what to do; checked at start, never found out under load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from vattn_kernels.checks import FP8_DTYPES, MAX_GROUP
from vattn_kernels.cpu import DTYPES, MAX_HEAD_DIM
from vattn_kernels.ops import GPU_CACHE_CAPABILITY, GPU_CACHE_DTYPES, GPU_CAPABILITY, GPU_DTYPES, GPU_HEAD_DIMS
from vattn_sgl.config import Settings

DENSE_ADVICE = "serve this model with another --attention-backend"
DEVICES = ("cpu", "cuda")
# Values of --kv-cache-dtype.
CACHE_NAMES = ("auto", "bfloat16", "bf16", "float32")
GPU_CACHE_NAMES = ("auto", "bfloat16", "bf16", "fp8_e4m3", "fp8_e5m2")


class Unsupported(ValueError):
    """The server cannot start with this backend.

    Attributes
    ----------
    reasons : list of str
        Everything that stands in the way, each with what to do.
    """

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(f"--attention-backend vattention cannot serve this:\n{lines}")


def check(model_runner: Any, settings: Settings) -> None:
    """Refuse what cannot be served.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner with its pools built.
    settings : Settings
        In force at start.

    Raises
    ------
    Unsupported
        With every reason at once.
    """
    reasons = [
        *argument_reasons(model_runner.server_args),
        *model_reasons(model_runner.model_config),
        *pool_reasons(model_runner.token_to_kv_pool),
        *dtype_reasons(model_runner.model_config, model_runner.token_to_kv_pool),
    ]
    if _device(model_runner.server_args) == "cuda":
        reasons += gpu_reasons(model_runner.server_args, settings)
        reasons += gpu_model_reasons(model_runner.model_config)
        capability = torch.cuda.get_device_capability()
        reasons += gpu_device_reasons(capability)
        reasons += gpu_pool_reasons(model_runner.token_to_kv_pool, settings.selector, capability)
    else:
        reasons += cpu_reasons(settings)
        reasons += cpu_pool_reasons(model_runner.token_to_kv_pool)
    model = getattr(model_runner, "model", None)
    if model is not None:
        reasons += layer_reasons(model)
    if reasons:
        raise Unsupported(reasons)


def _device(args: Any) -> str:
    return str(getattr(args, "device", None) or "cpu").split(":")[0]


def argument_reasons(args: Any) -> Iterator[str]:
    """Reasons in the server's arguments.

    Parameters
    ----------
    args : ServerArgs
        SGLang's arguments; missing attributes count as off.
    """

    def given(name: str) -> Any:
        return getattr(args, name, None)

    device = _device(args)
    if device not in DEVICES:
        yield f"device {device}: there are kernels for CPUs and NVIDIA GPUs; start with --device cpu or --device cuda"
    if (given("page_size") or 1) != 1 and device == "cpu":
        yield f"--page-size {given('page_size')}: SGLang's allocator of pages needs a GPU; use --page-size 1"
    kv_cache_dtype = given("kv_cache_dtype") or "auto"
    if device == "cuda" and kv_cache_dtype not in GPU_CACHE_NAMES:
        yield f"--kv-cache-dtype {kv_cache_dtype}: a GPU reads {', '.join(GPU_CACHE_NAMES[1:])}; leave it at auto"
    elif device != "cuda" and kv_cache_dtype not in CACHE_NAMES:
        yield f"--kv-cache-dtype {kv_cache_dtype}: a CPU reads float32 and bfloat16 caches only; leave it at auto"
    for phase in ("prefill", "decode"):
        name = f"{phase}_attention_backend"
        if given(name) and not (
            given("prefill_attention_backend") == given("decode_attention_backend") == "vattention"
        ):
            yield (
                f"--{name.replace('_', '-')} {given(name)}: SGLang's split of backends bypasses the index of new "
                "tokens; use --attention-backend vattention alone, which delegates prefill itself"
            )
            break
    flags = {
        "speculative_algorithm": "speculative decoding: several queries a step have no bound yet",
        "enable_hierarchical_cache": "HiCache writes slots behind the backend's back",
        "enable_deterministic_inference": "deterministic inference asks for batch-invariant kernels",
        "enable_dp_attention": "DP attention is untested with this backend",
        "enable_two_batch_overlap": "two-batch overlap splits a step between backends",
        "enable_mixed_chunk": "mixed chunks decode some requests whole, beside a prefill",
        "enable_pdmux": "PD multiplexing runs several backends at once",
        "enable_unified_memory": "a unified memory pool translates slots",
        "enable_lmcache": "LMCache writes slots behind the backend's back",
        "enable_double_sparsity": "double sparsity is another sparse attention",
        "encoder_only": "an encoder has no decode step",
    }
    for name, reason in flags.items():
        if given(name):
            yield f"{reason}; remove --{name.replace('_', '-')}"
    if given("disaggregation_mode") not in (None, "null"):
        yield (
            f"--disaggregation-mode {given('disaggregation_mode')}: transferred slots arrive without an index; "
            "serve prefill and decode in one server"
        )
    if (given("tokenizer_worker_num") or 1) > 1:
        yield "--tokenizer-worker-num above 1: the admin routes do not exist there; use 1"
    for name in ("tp_size", "pp_size", "dp_size"):
        if (given(name) or 1) > 1 and device == "cpu":
            yield f"--{name.replace('_', '-')} {given(name)}: on a CPU one process serves; use 1"
        elif (given(name) or 1) > 1 and name != "dp_size":
            yield f"--{name.replace('_', '-')} {given(name)}: ranks would overwrite each other's calibration; use 1"
    if os.environ.get("SGLANG_USE_HND_KVCACHE", "").lower() in ("1", "true"):
        yield "SGLANG_USE_HND_KVCACHE: the HND cache layout is not read; unset the variable"


def gpu_reasons(args: Any, settings: Settings) -> Iterator[str]:
    """Reasons in what the GPU kernels of this version lack.

    Parameters
    ----------
    args : ServerArgs
        SGLang's arguments; missing attributes count as off.
    settings : Settings
        In force at start.
    """
    here = "the GPU kernels of this version"
    if settings.group_score != "max":
        yield f"group_score {settings.group_score}: {here} share scores by their maximum; set group_score to max"
    if settings.effective_bound == "bernstein":
        yield f"bound bernstein: {here} bound no single logit; leave bound at null, or serve on a CPU"
    prefill = getattr(getattr(args, "cuda_graph_config", None), "prefill", None)
    if getattr(prefill, "backend", None) == "full":
        yield "--cuda-graph-backend-prefill full: a whole graph hides prefill from the calibration; use breakable"
    if os.environ.get("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "").lower() in ("1", "true"):
        yield "SGLANG_ENABLE_METADATA_GLUE_GRAPH: a change of epsilon would never be applied; unset the variable"


def gpu_model_reasons(config: Any) -> Iterator[str]:
    """Reasons in a model's shape on a GPU.

    Parameters
    ----------
    config : ModelConfig
        SGLang's configuration of the model; missing attributes count as right.
    """
    head_dim = getattr(config, "head_dim", None)
    if head_dim and head_dim not in GPU_HEAD_DIMS:
        allowed = ", ".join(map(str, GPU_HEAD_DIMS))
        yield f"head_dim {head_dim}: the GPU kernels of this version serve {allowed}; {DENSE_ADVICE}"
    dtype = getattr(config, "dtype", GPU_DTYPES[0])
    if dtype not in GPU_DTYPES:
        yield f"a model in {dtype}: the GPU kernels of this version take bfloat16 and float16; use --dtype bfloat16"


def gpu_device_reasons(capability: tuple[int, int]) -> Iterator[str]:
    """Reasons in a GPU.

    Parameters
    ----------
    capability : tuple of int
        Its compute capability.
    """
    if capability < GPU_CAPABILITY:
        yield f"a GPU of compute capability {_dotted(capability)}: the kernels take {_dotted(GPU_CAPABILITY)} and later"


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def gpu_pool_reasons(pool: Any, selector: str = "sketch", capability: tuple[int, int] | None = None) -> Iterator[str]:
    """Reasons in a GPU's KV pool.

    Parameters
    ----------
    pool : KVCache
        SGLang's pool; a missing dtype counts as right.
    selector : str
        Of the settings in force at start.
    capability : tuple of int, optional
        Compute capability of the GPU; None counts as right.
    """
    dtype = getattr(pool, "dtype", GPU_DTYPES[0])
    least = GPU_CACHE_CAPABILITY.get(dtype, (0, 0))
    if dtype not in GPU_CACHE_DTYPES:
        yield f"KV cache of {dtype}: the GPU kernels of this version read 16 bits and fp8; use --dtype bfloat16"
    elif dtype in FP8_DTYPES and selector != "sketch":
        yield f"KV cache of {dtype}: selector {selector} reads 16 bits; use --kv-cache-dtype auto or selector sketch"
    elif capability is not None and capability < least:
        needed, found = _dotted(least), _dotted(capability)
        yield f"KV cache of {dtype}: that takes compute capability {needed}, not {found}; use --kv-cache-dtype fp8_e5m2"


def cpu_reasons(settings: Settings) -> Iterator[str]:
    """Reasons in settings that only a GPU obeys.

    Parameters
    ----------
    settings : Settings
        In force at start.
    """
    if settings.dense_backend is not None:
        yield f"dense_backend {settings.dense_backend}: a CPU reads whole contexts with our own kernel; set it to null"


def cpu_pool_reasons(pool: Any) -> Iterator[str]:
    """Reasons in a CPU's KV pool.

    Parameters
    ----------
    pool : KVCache
        SGLang's pool; a missing dtype counts as right.
    """
    dtype = getattr(pool, "dtype", DTYPES[0])
    if dtype not in DTYPES:
        yield f"KV cache of {dtype}: the CPU kernels read float32 and bfloat16; use --dtype bfloat16 or float32"


def model_reasons(config: Any) -> Iterator[str]:
    """Reasons in a model's configuration.

    Parameters
    ----------
    config : ModelConfig
        SGLang's configuration of the model; missing attributes count as absent.
    """
    arch = getattr(getattr(config, "attention_arch", None), "name", "MHA")
    if arch != "MHA":
        yield f"attention architecture {arch}: only MHA, MQA and GQA keep the K and V that are sampled; {DENSE_ADVICE}"
    if getattr(config, "is_encoder_decoder", False):
        yield f"an encoder-decoder model: cross attention is not covered; {DENSE_ADVICE}"
    if getattr(config, "is_generation", True) is False:
        yield f"not a generating model: there is no decode step; {DENSE_ADVICE}"
    if getattr(config, "is_hybrid_swa", False) or getattr(config, "is_hybrid", False):
        yield f"sliding-window layers beside full ones: their pool is laid out differently; {DENSE_ADVICE}"
    text = getattr(config, "hf_text_config", None)
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap:
        yield f"logits capped at {cap}: the bound holds for plain softmax only; {DENSE_ADVICE}"
    head_dim, value_dim = getattr(config, "head_dim", None), getattr(config, "v_head_dim", None)
    if head_dim and value_dim and head_dim != value_dim:
        yield f"head_dim {head_dim} of K and {value_dim} of V differ: the kernels expect one; {DENSE_ADVICE}"
    if head_dim and (head_dim > MAX_HEAD_DIM or head_dim % 16):
        yield f"head_dim {head_dim}: the kernels serve multiples of 16 up to {MAX_HEAD_DIM}; {DENSE_ADVICE}"
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and (heads % kv_heads or heads // kv_heads > MAX_GROUP):
        yield f"{heads} query over {kv_heads} KV heads: groups must be whole and at most {MAX_GROUP}; {DENSE_ADVICE}"


def pool_reasons(pool: Any) -> Iterator[str]:
    """Reasons in the KV pool that SGLang built.

    Parameters
    ----------
    pool : KVCache
        SGLang's pool.
    """
    kind = type(pool).__name__
    if kind != "MHATokenToKVPool":
        yield f"KV pool {kind}: only SGLang's plain MHATokenToKVPool is read; {DENSE_ADVICE}"
    elif getattr(pool, "kv_cache_layout", "nhd") != "nhd" or getattr(pool, "use_hnd", False):
        yield "KV cache layout is not [slot, head, dim]; unset SGLANG_USE_HND_KVCACHE"


def dtype_reasons(config: Any, pool: Any) -> Iterator[str]:
    """Reasons in a model's dtype beside its KV pool's.

    Parameters
    ----------
    config : ModelConfig
        SGLang's configuration of the model; a missing dtype counts as right.
    pool : KVCache
        SGLang's pool; likewise.
    """
    model, cache = getattr(config, "dtype", None), getattr(pool, "dtype", None)
    if None not in (model, cache) and cache not in (model, *FP8_DTYPES):
        yield f"a model in {model} with a KV cache of {cache}: the kernels read one dtype; use --kv-cache-dtype auto"


def layer_reasons(model: Any) -> list[str]:
    """Reasons in a built model's attention layers.

    Parameters
    ----------
    model : torch.nn.Module
        SGLang's model.
    """
    reasons: list[str] = []
    for layer in model.modules():
        if type(layer).__name__ != "RadixAttention":
            continue
        window = getattr(layer, "sliding_window_size", None) or -1
        if window > 0:
            reasons.append(f"sliding window of {window} tokens: the sample covers whole contexts; {DENSE_ADVICE}")
        cap = getattr(layer, "logit_cap", 0)
        if cap:
            reasons.append(f"logits capped at {cap}: the bound holds for plain softmax only; {DENSE_ADVICE}")
        if getattr(layer, "is_cross_attention", False):
            reasons.append(f"cross attention: its cache is not sampled; {DENSE_ADVICE}")
        kind = getattr(layer, "attn_type", None)
        kind = getattr(kind, "value", kind)
        if kind not in (None, "decoder"):
            reasons.append(f"attention of type {kind}: only decoder attention is causal; {DENSE_ADVICE}")
        if getattr(layer, "k_scale", None) is not None and getattr(layer, "k_scale_float", None) is None:
            reasons.append(
                "--quantization-param-path: SGLang's own backends, which prefill, cannot read these scales; use a "
                "checkpoint that holds its own"
            )
        if getattr(layer, "sinks", None) is not None:
            reasons.append(f"learned attention sinks: they are not part of the estimate; {DENSE_ADVICE}")
    return list(dict.fromkeys(reasons))
