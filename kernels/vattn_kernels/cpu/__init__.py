"""CPU implementation of the ops: checks arguments and calls ``kernels.cpp``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vattn_kernels import params as layout
from vattn_kernels.cpu import build

MAX_GROUP = 16
MAX_HEAD_DIM = 256
TARGETS = ("output", "denominator", "numerator", "sdpa")
DTYPES = (torch.float32, torch.bfloat16)

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _structure(name: str, pointers: str, integers: str, doubles: str = "", tail: str = "") -> type[ctypes.Structure]:
    members = [
        (field, kind)
        for names, kind in ((pointers, _POINTER), (integers, _INT), (doubles, _DOUBLE), (tail, _INT))
        for field in names.split()
    ]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_DecodeArgs = _structure(
    "_DecodeArgs",
    "q k_cache v_cache kv_indices seq_lens codes norms valid mean query_basis steps fields params covered out stats "
    "counters counter_offsets budget_edges error_edges audit_edges workspace",
    "batch num_qo_heads num_kv_heads head_dim kv_stride max_fields words num_budget_edges num_error_edges "
    "num_audit_edges layer_id seed sink window dense_below top_k_count pilot_min workspace_stride seq_lens_is_int64 "
    "is_bf16 is_uniform target is_oracle threads",
    "sm_scale top_k_share pilot cap floor audit_rate",
    "table log_term table_points table_steps",
)
_EncodeArgs = _structure(
    "_EncodeArgs",
    "k_cache v_cache slots mean key_basis steps fields codes norms valid",
    "num_slots num_kv_heads head_dim max_fields words is_bf16 threads",
)

_workspace = torch.empty(0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"vattn on CPU: {message}")


def _reserve(numel: int) -> int:
    """Address of a float32 workspace that only ever grows; the CPU runs one op at a time."""
    global _workspace
    if _workspace.numel() < numel:
        _workspace = torch.empty(numel * 5 // 4)
    return _workspace.data_ptr()


def _check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    _require(
        k_cache.dtype in DTYPES, f"dtype {k_cache.dtype} of the KV cache is not supported, expected float32 or bfloat16"
    )
    _require(k_cache.dtype == v_cache.dtype, f"k_cache is {k_cache.dtype} but v_cache is {v_cache.dtype}")
    _require(
        k_cache.shape == v_cache.shape, f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} differ"
    )
    _require(k_cache.is_contiguous() and v_cache.is_contiguous(), "k_cache and v_cache must be contiguous")
    _require(k_cache.shape[-1] <= MAX_HEAD_DIM, f"head_dim {k_cache.shape[-1]} is above {MAX_HEAD_DIM}")


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_indices: Tensor, seq_lens: Tensor, codes: Tensor | None,
    norms: Tensor | None, valid: Tensor | None, mean: Tensor | None, query_basis: Tensor | None, steps: Tensor | None,
    fields: Tensor | None, params: Tensor, covered: Tensor, budget_edges: Tensor, error_edges: Tensor,
    audit_edges: Tensor, out: Tensor, stats: Tensor, counters: Tensor, counter_offsets: list[int], sm_scale: float,
    layer_id: int, seed: int, sampler: str, target: str, selector: str, sink: int, window: int, dense_below: int,
    top_k_count: int, top_k_share: float, pilot: float, pilot_min: int, cap: float, floor: float, audit_rate: float,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.decode`."""
    _check_cache(k_cache, v_cache)
    batch, num_qo_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_qo_heads // num_kv_heads
    _require(
        q.dtype == k_cache.dtype == out.dtype,
        f"q is {q.dtype}, out {out.dtype}, the KV cache {k_cache.dtype}; expected one dtype",
    )
    _require(
        num_qo_heads % num_kv_heads == 0 and group <= MAX_GROUP,
        f"{num_qo_heads} query heads over {num_kv_heads} KV heads: the group must be whole and at most {MAX_GROUP}",
    )
    _require(q.is_contiguous() and out.is_contiguous() and stats.is_contiguous(), "q, out and stats must be contiguous")
    _require(
        kv_indices.dtype == torch.int32 and kv_indices.stride(1) == 1,
        "kv_indices must be int32 with unit stride along positions",
    )
    _require(seq_lens.dtype in (torch.int32, torch.int64), f"seq_lens must be int32 or int64, got {seq_lens.dtype}")
    _require(sampler in ("proportional", "uniform"), f"sampler {sampler!r} is unknown")
    _require(target in TARGETS, f"target {target!r} is unknown, expected one of {', '.join(TARGETS)}")
    _require(selector in ("sketch", "oracle"), f"selector {selector!r} is unknown")
    _require(pilot_min >= 4 and pilot > 0, f"pilot_min {pilot_min} must be at least 4 and pilot {pilot} above 0")
    _require(params.numel() == layout.PARAMS_WIDTH, f"params has {params.numel()} values, not {layout.PARAMS_WIDTH}")
    is_sketch, is_split = selector == "sketch", target == "sdpa"
    side = [t for t in (codes, norms, valid, mean, query_basis, steps, fields) if t is not None] if is_sketch else []
    _require(not is_sketch or len(side) == 7, "selector 'sketch' needs side data, got none")
    offsets = (ctypes.c_int64 * len(counter_offsets))(*counter_offsets)
    stride = (group + 1) * kv_indices.stride(0)
    args = _DecodeArgs(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), kv_indices.data_ptr(), seq_lens.data_ptr(),
        *([t.data_ptr() for t in side] if is_sketch else [None] * 7),
        params.data_ptr(), covered.data_ptr(), out.data_ptr(),
        stats.data_ptr(), counters.data_ptr(), ctypes.addressof(offsets), budget_edges.data_ptr(),
        error_edges.data_ptr(), audit_edges.data_ptr(), _reserve(batch * num_kv_heads * stride),
        batch, num_qo_heads, num_kv_heads, head_dim, kv_indices.stride(0), side[5].shape[-1] if is_sketch else 0,
        side[0].shape[-1] if is_sketch else 0, budget_edges.numel(), error_edges.numel(), audit_edges.numel(), layer_id,
        seed & 0xFFFFFFFF, sink, window, dense_below, top_k_count, pilot_min, stride, seq_lens.dtype == torch.int64,
        q.dtype == torch.bfloat16, sampler == "uniform", TARGETS.index(target), not is_sketch, torch.get_num_threads(),
        sm_scale, top_k_share, pilot, cap, floor, audit_rate,
        layout.SPLIT_TABLE if is_split else layout.TABLE, layout.SPLIT_LOG if is_split else layout.LOG,
        layout.TABLE_POINTS, layout.TABLE_STEPS_PER_UNIT,
    )  # fmt: skip
    build.library().vattn_decode(ctypes.byref(args))


def encode(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, mean: Tensor, key_basis: Tensor, steps: Tensor, fields: Tensor,
    codes: Tensor, norms: Tensor, valid: Tensor,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.encode`."""
    _check_cache(k_cache, v_cache)
    _require(slots.dtype == torch.int64 and slots.is_contiguous(), f"slots must be contiguous int64, got {slots.dtype}")
    args = _EncodeArgs(
        k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), mean.data_ptr(), key_basis.data_ptr(),
        steps.data_ptr(), fields.data_ptr(), codes.data_ptr(), norms.data_ptr(), valid.data_ptr(), slots.numel(),
        k_cache.shape[1], k_cache.shape[2], steps.shape[-1], codes.shape[-1], k_cache.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode(ctypes.byref(args))
