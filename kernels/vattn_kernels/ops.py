"""Custom ops of vAttention: contract, fake and dispatch by device.

Importing this module registers ``torch.ops.vattn.decode`` and the encoders beside it. Implementations stand in
`vattn_kernels.cpu` and `vattn_kernels.triton`; the truth, in float64, in `vattn_kernels.reference`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from vattn_kernels import cpu
from vattn_kernels.checks import FP8_DTYPES as FP8_DTYPES
from vattn_kernels.checks import GROUP_SCORES as GROUP_SCORES
from vattn_kernels.checks import OUTCOMES as OUTCOMES
from vattn_kernels.checks import READ_KINDS as READ_KINDS
from vattn_kernels.checks import SAMPLERS as SAMPLERS
from vattn_kernels.checks import STATS as STATS
from vattn_kernels.quantiles import TARGETS as TARGETS

SELECTORS = ("sketch", "oracle", "quest", "sign", "hash")
# Columns of ``state``.
STATE_WIDTH = 4
# What the GPU kernels serve; a server asks before it imports Triton.
GPU_HEAD_DIMS = (64, 96, 128, 256)
GPU_DTYPES = (torch.bfloat16, torch.float16)
GPU_CACHE_DTYPES = (*GPU_DTYPES, *FP8_DTYPES)
# Compute capability that they take, and that a cache's dtype does, where not every GPU converts it.
GPU_CAPABILITY = (8, 0)
GPU_CACHE_CAPABILITY = {torch.float8_e4m3fn: (8, 9)}

_LIBRARY = torch.library.Library("vattn", "DEF")
_LIBRARY.define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_indices, Tensor seq_lens, "
    "Tensor? codes, Tensor? norms, Tensor? valid, Tensor? mean, Tensor? query_basis, Tensor? steps, Tensor? fields, "
    "Tensor params, Tensor covered, Tensor budget_edges, Tensor error_edges, Tensor audit_edges, "
    "Tensor(a!) out, Tensor(b!) stats, Tensor(c!) counters, int[] counter_offsets, "
    "float sm_scale, int layer_id, int seed, str sampler, str target, str selector, "
    "int sink, int window, int dense_below, int top_k_count, float top_k_share, "
    'float pilot, int pilot_min, float cap, float floor, float audit_rate, str group_score="max", '
    "Tensor(d!)? state=None, Tensor? state_rows=None, float k_scale=1.0, float v_scale=1.0) -> ()"
)
_LIBRARY.define(
    "encode(Tensor k_cache, Tensor v_cache, Tensor slots, Tensor mean, Tensor key_basis, Tensor steps, Tensor fields, "
    "Tensor(a!) codes, Tensor(b!) norms, Tensor(c!) valid, *, float k_scale=1.0, float v_scale=1.0) -> ()"
)
_LIBRARY.define(
    "encode_layers(Tensor[] k_caches, Tensor[] v_caches, Tensor slots, Tensor mean, Tensor key_basis, Tensor steps, "
    "Tensor fields, Tensor(a!) codes, Tensor(b!) norms, Tensor(c!) valid, "
    "*, float[]? k_scales=None, float[]? v_scales=None) -> ()"
)
_LIBRARY.define(
    "encode_signature(Tensor k_cache, Tensor slots, Tensor mean, Tensor nets, Tensor widths, "
    "Tensor(a!) codes, Tensor(b!) norms, Tensor(c!) valid, bool centred) -> ()"
)
_LIBRARY.define(
    "encode_pages(Tensor k_cache, Tensor v_cache, Tensor slots, "
    "Tensor(a!) bounds, Tensor(b!) norms, Tensor(c!) valid) -> ()"
)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    codes: torch.Tensor | None,
    norms: torch.Tensor | None,
    valid: torch.Tensor | None,
    mean: torch.Tensor | None,
    query_basis: torch.Tensor | None,
    steps: torch.Tensor | None,
    fields: torch.Tensor | None,
    params: torch.Tensor,
    covered: torch.Tensor,
    budget_edges: torch.Tensor,
    error_edges: torch.Tensor,
    audit_edges: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    counters: torch.Tensor,
    counter_offsets: list[int],
    **settings: Any,
) -> None:
    """One decode step of one layer with a certified error, for every request of the batch.

    Requests shorter than ``dense_below``, longer than ``covered`` or with too small a range are served densely and
    counted as such. The estimator is `vattn_kernels.reference.decode`.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch, num_qo_heads, head_dim]``, contiguous: float32 or bfloat16 on a CPU, bfloat16 or float16 on a GPU.
    k_cache, v_cache : torch.Tensor
        ``[num_slots, num_kv_heads, head_dim]`` of q's dtype or, on a GPU, of one of `GPU_CACHE_DTYPES`, contiguous.
    kv_indices : torch.Tensor
        int32 ``[batch, max_len]``; row r holds the slots of request r by position.
    seq_lens : torch.Tensor
        int32 or int64 ``[batch]``, tokens in each cache, the current one included; 0 is a padded row. No more than
        ``max_len``, which a GPU does not check.
    codes : torch.Tensor, optional
        int32 ``[num_slots, num_kv_heads, words]`` sketch or signature of every slot's key, contiguous on a CPU; on a
        GPU one head's rows lie side by side, ``norms`` likewise; ``quest``: page bounds of
        k_cache's dtype ``[num_pages, num_kv_heads, 2, head_dim]``, see `encode_pages`. ``oracle`` ignores the seven
        side-data arguments, ``quest`` uses neither query_basis nor fields, the other selectors need all.
    norms : torch.Tensor, optional
        uint8 ``[num_slots, num_kv_heads, norms]``, each ``2^((byte - 128) / 8)``: coding error and norm of v
        (``sketch``), norm of v (``quest``), norm of the key less the mean (``sign``, ``hash``).
    valid : torch.Tensor, optional
        uint8 ``[num_slots]``; a token whose byte is 0 has no usable side data and is read for certain. For ``sketch``
        a GPU reads an error byte of `vattn_kernels.sketch.UNUSABLE` instead.
    mean : torch.Tensor, optional
        float32 ``[num_kv_heads, head_dim]`` mean key.
    query_basis : torch.Tensor, optional
        ``sketch``: as in `vattn_kernels.sketch.SketchTables`. ``sign``, ``hash``: nets of the queries, float32
        ``[num_qo_heads, parameters]``, see `vattn_kernels.signature.pack`.
    steps : torch.Tensor, optional
        ``sketch``: as in `vattn_kernels.sketch.SketchTables`. Others: line of `vattn_kernels.line.LineTables`.
    fields : torch.Tensor, optional
        ``sketch``: as in `vattn_kernels.sketch.SketchTables`. ``sign``, ``hash``: int32 widths of the nets, always on
        a CPU, for they shape launches.
    params : torch.Tensor
        float32 ``[PARAMS_WIDTH]``, see `vattn_kernels.params`.
    covered : torch.Tensor
        int32 ``[1]``, longest context the selector's calibration covers; longer ones are served densely.
    budget_edges, error_edges, audit_edges : torch.Tensor
        float32, upper bucket borders of the three histograms.
    out : torch.Tensor
        ``[batch, num_qo_heads, head_dim]`` of q's dtype, written.
    stats : torch.Tensor
        float32 ``[batch, num_qo_heads, 6]``, written; columns `STATS`.
    counters : torch.Tensor
        float64 ``[width]``, added to. Blocks begin at ``counter_offsets``: context tokens; tokens read by
        `READ_KINDS`; head-steps by `OUTCOMES`; budget histogram; error histogram; audits and violations; audited
        error histogram. A histogram is its sum followed by one count a bucket, the last for overflow.
    counter_offsets : list of int
        Seven block starts.
    **settings
        ``sm_scale, layer_id, seed, sampler, target, selector, sink, window, dense_below, top_k_count`` (-1: use
        ``top_k_share``), ``top_k_share, pilot, pilot_min, cap, floor, audit_rate, group_score``; see
        `vattn_sgl.config.Settings`. And what the last step learnt of each request and head, which a GPU starts from
        and a CPU ignores: ``state`` float32 ``[num_rows, num_qo_heads, STATE_WIDTH]``, updated, zeros at start, and
        ``state_rows`` int64 ``[batch]``, the row of each request. And what the cache is multiplied by: a key is
        ``k_cache * k_scale``, a value ``v_cache * v_scale``; 1 on a CPU.

    Raises
    ------
    ValueError
        If a shape, dtype or setting is not supported; the message names it.
    """
    torch.ops.vattn.decode(
        q, k_cache, v_cache, kv_indices, seq_lens, codes, norms, valid, mean, query_basis, steps, fields,
        params, covered, budget_edges, error_edges, audit_edges, out, stats, counters, counter_offsets, **settings,
    )  # fmt: skip


def reserve(
    device: torch.device,
    max_batch: int,
    max_len: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sampler: str = "proportional",
) -> None:
    """Allocate what the ops of a device work in, so that no step allocates; nothing on a CPU.

    A GPU's steps share it, so they must follow each other on one stream.

    Parameters
    ----------
    device : torch.device
        Where the KV cache lives.
    max_batch, max_len : int
        Largest batch and widest page table that `decode` will be given.
    num_qo_heads, num_kv_heads, head_dim : int
        Of the model on this rank.
    sampler : {"proportional", "uniform"}
        That `decode` will be given.
    """
    if device.type == "cuda":
        _gpu().reserve(device, max_batch, max_len, num_qo_heads, num_kv_heads, head_dim, sampler)


def _gpu() -> ModuleType:
    """The GPU kernels; Triton is imported where there is a GPU only."""
    return importlib.import_module("vattn_kernels.triton")


def encode(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    mean: torch.Tensor,
    key_basis: torch.Tensor,
    steps: torch.Tensor,
    fields: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    valid: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Compute the sketch of cache slots by reading K and V back from the pool, and mark them valid.

    Parameters
    ----------
    k_cache, v_cache : torch.Tensor
        ``[num_slots, num_kv_heads, head_dim]``, of a dtype that the device's `decode` reads.
    slots : torch.Tensor
        int64 ``[num_new]`` slots to encode.
    mean, key_basis, steps, fields : torch.Tensor
        One layer of `vattn_kernels.sketch.SketchTables`.
    codes, norms, valid : torch.Tensor
        Side data as in `decode`; the given slots are overwritten.
    k_scale, v_scale : float
        As in `decode`.

    Raises
    ------
    ValueError
        If a shape or dtype is not supported.
    """
    torch.ops.vattn.encode(
        k_cache, v_cache, slots, mean, key_basis, steps, fields, codes, norms, valid, k_scale=k_scale, v_scale=v_scale
    )


def encode_layers(
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    slots: torch.Tensor,
    mean: torch.Tensor,
    key_basis: torch.Tensor,
    steps: torch.Tensor,
    fields: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    valid: torch.Tensor,
    *,
    k_scales: list[float] | None = None,
    v_scales: list[float] | None = None,
) -> None:
    """Compute the sketch of the same slots in several layers, as `encode` does in one.

    Parameters
    ----------
    k_caches, v_caches : list of torch.Tensor
        One layer's each, as for `encode`; of equal strides.
    slots : torch.Tensor
        int64 ``[num_new]`` slots to encode.
    mean, key_basis, steps, fields : torch.Tensor
        `vattn_kernels.sketch.SketchTables` of as many layers.
    codes, norms, valid : torch.Tensor
        ``[num_layers, ...]`` side data as in `decode`; the given slots are overwritten.
    k_scales, v_scales : list of float, optional
        One a layer, as in `decode`; default 1.

    Raises
    ------
    ValueError
        If a shape or dtype is not supported.
    """
    torch.ops.vattn.encode_layers(
        k_caches, v_caches, slots, mean, key_basis, steps, fields, codes, norms, valid,
        k_scales=k_scales, v_scales=v_scales,
    )  # fmt: skip


def encode_signature(
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    mean: torch.Tensor,
    nets: torch.Tensor,
    widths: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    valid: torch.Tensor,
    centred: bool,
) -> None:
    """Compute the signatures of cache slots by reading K back from the pool, and mark them valid.

    Parameters
    ----------
    k_cache : torch.Tensor
        ``[num_slots, num_kv_heads, head_dim]``, of a dtype that the device's `decode` reads.
    slots : torch.Tensor
        int64 ``[num_new]`` slots to encode.
    mean : torch.Tensor
        float32 ``[num_kv_heads, head_dim]`` mean key.
    nets : torch.Tensor
        float32 ``[num_kv_heads or num_qo_heads, parameters]`` from `vattn_kernels.signature.pack`; one net per query
        head gives every query head its own signature of the key.
    widths : torch.Tensor
        int32 ``[layers + 1]``, on a CPU whatever the device.
    codes, norms, valid : torch.Tensor
        Side data as in `decode`; the given slots are overwritten.
    centred : bool
        Whether the nets see the key less the mean key.

    Raises
    ------
    ValueError
        If a shape or dtype is not supported.
    """
    torch.ops.vattn.encode_signature(k_cache, slots, mean, nets, widths, codes, norms, valid, centred)


def encode_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    norms: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """Mark cache slots valid and recompute the bounds of their pages by reading K and V back from the pool.

    A page is a block of 16 consecutive slots, whatever requests they belong to: its bounds cover every valid slot, so
    they hold for each.

    Parameters
    ----------
    k_cache, v_cache : torch.Tensor
        ``[num_slots, num_kv_heads, head_dim]``, of a dtype that the device's `decode` reads.
    slots : torch.Tensor
        int64 ``[num_new]`` slots to encode.
    bounds : torch.Tensor
        ``[num_pages, num_kv_heads, 2, head_dim]`` of k_cache's dtype: least and greatest key by element.
    norms : torch.Tensor
        uint8 ``[num_slots, num_kv_heads, 1]`` norm of v.
    valid : torch.Tensor
        uint8 ``[num_slots]``.

    Raises
    ------
    ValueError
        If a shape or dtype is not supported.
    """
    torch.ops.vattn.encode_pages(k_cache, v_cache, slots, bounds, norms, valid)


_LIBRARY.impl("decode", cpu.decode, "CPU")
_LIBRARY.impl("encode", cpu.encode, "CPU")
_LIBRARY.impl("encode_layers", cpu.encode_layers, "CPU")
_LIBRARY.impl("encode_signature", cpu.encode_signature, "CPU")
_LIBRARY.impl("encode_pages", cpu.encode_pages, "CPU")
_LIBRARY.impl("decode", lambda *args, **kwargs: _gpu().decode(*args, **kwargs), "CUDA")
_LIBRARY.impl("encode", lambda *args, **kwargs: _gpu().encode(*args, **kwargs), "CUDA")
_LIBRARY.impl("encode_layers", lambda *args, **kwargs: _gpu().encode_layers(*args, **kwargs), "CUDA")
_LIBRARY.impl("encode_signature", lambda *args: _gpu().encode_signature(*args), "CUDA")
_LIBRARY.impl("encode_pages", lambda *args: _gpu().encode_pages(*args), "CUDA")


@torch.library.register_fake("vattn::decode", lib=_LIBRARY)
def _decode_fake(*args: Any, **kwargs: Any) -> None:
    return None


@torch.library.register_fake("vattn::encode", lib=_LIBRARY)
def _encode_fake(*args: Any, **kwargs: Any) -> None:
    return None


@torch.library.register_fake("vattn::encode_layers", lib=_LIBRARY)
def _encode_layers_fake(*args: Any, **kwargs: Any) -> None:
    return None


@torch.library.register_fake("vattn::encode_signature", lib=_LIBRARY)
def _encode_signature_fake(*args: Any, **kwargs: Any) -> None:
    return None


@torch.library.register_fake("vattn::encode_pages", lib=_LIBRARY)
def _encode_pages_fake(*args: Any, **kwargs: Any) -> None:
    return None
