"""CPU implementation of the ops: checks arguments and calls ``kernels.cpp``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vattn_kernels import params as layout
from vattn_kernels.checks import (
    GROUP_SCORES,
    SAMPLERS,
    SIDE,
    check_cache,
    check_contiguous,
    check_decode,
    check_nets,
    check_settings,
    check_side,
    check_signatures,
    check_slots,
    needed_side,
    require,
)
from vattn_kernels.cpu import build
from vattn_kernels.quantiles import PROVABLE_SELECTORS, TARGETS

MAX_HEAD_DIM = 256
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
    "is_bf16 is_uniform target selector threads",
    "sm_scale top_k_share pilot cap floor audit_rate",
    "table log_term table_points table_steps group_mean norm_bytes num_layers",
)
_EncodeArgs = _structure(
    "_EncodeArgs",
    "k_cache v_cache slots mean key_basis steps fields codes norms valid",
    "num_slots num_kv_heads head_dim max_fields words is_bf16 threads",
)
_SignatureArgs = _structure(
    "_SignatureArgs",
    "k_cache slots mean nets widths codes norms valid",
    "num_slots num_kv_heads head_dim num_nets num_layers words centred is_bf16 threads",
)
_PageArgs = _structure(
    "_PageArgs",
    "k_cache v_cache slots bounds norms valid",
    "num_slots pool_slots num_kv_heads head_dim is_bf16 threads",
)
# Numbered as in kernels.cpp.
SELECTOR_NUMBERS = {"sketch": 0, "oracle": 1, "quest": 2, "sign": 3, "hash": 4}

_workspace = torch.empty(0)


def _reserve(numel: int) -> int:
    """Address of a float32 workspace that only ever grows; the CPU runs one op at a time."""
    global _workspace
    if _workspace.numel() < numel:
        _workspace = torch.empty(numel * 5 // 4)
    return _workspace.data_ptr()


def _check_cache(k_cache: Tensor, v_cache: Tensor, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    check_cache(k_cache, v_cache, DTYPES)
    require(k_scale == v_scale == 1, "k_scale {} and v_scale {}: a CPU reads no scaled cache", k_scale, v_scale)
    require(k_cache.shape[-1] <= MAX_HEAD_DIM, "head_dim {} is above {}", k_cache.shape[-1], MAX_HEAD_DIM)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_indices: Tensor, seq_lens: Tensor, codes: Tensor | None,
    norms: Tensor | None, valid: Tensor | None, mean: Tensor | None, query_basis: Tensor | None, steps: Tensor | None,
    fields: Tensor | None, params: Tensor, covered: Tensor, budget_edges: Tensor, error_edges: Tensor,
    audit_edges: Tensor, out: Tensor, stats: Tensor, counters: Tensor, counter_offsets: list[int], sm_scale: float,
    layer_id: int, seed: int, sampler: str, target: str, selector: str, sink: int, window: int, dense_below: int,
    top_k_count: int, top_k_share: float, pilot: float, pilot_min: int, cap: float, floor: float, audit_rate: float,
    group_score: str = "max", state: Tensor | None = None, state_rows: Tensor | None = None, k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.decode`; it needs no state."""
    _check_cache(k_cache, v_cache, k_scale, v_scale)
    check_decode(
        q, k_cache, kv_indices, seq_lens, params, covered, budget_edges, error_edges, audit_edges, out, stats, counters,
        counter_offsets, target,
    )  # fmt: skip
    batch, num_qo_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_qo_heads // num_kv_heads
    longest = int(seq_lens.max())
    require(longest <= kv_indices.shape[1], "a context of {} tokens, kv_indices has {}", longest, kv_indices.shape[1])
    require(sampler in SAMPLERS, "sampler {!r} is unknown, expected one of {}", sampler, SAMPLERS)
    require(
        selector in SELECTOR_NUMBERS, "selector {!r} is unknown, expected one of {}", selector, (*SELECTOR_NUMBERS,)
    )
    require(group_score in GROUP_SCORES, "group_score {!r} is unknown, expected one of {}", group_score, GROUP_SCORES)
    check_settings(sm_scale, sink, window, pilot, pilot_min, cap, floor, audit_rate, k_scale, v_scale)
    require(
        selector in PROVABLE_SELECTORS or float(params[layout.LOG]) == 0,
        "bound 'bernstein' needs an upper bound of every logit, which selector {!r} does not have: expected one of {}",
        *(selector, PROVABLE_SELECTORS),
    )
    side = _side_data(selector, (codes, norms, valid, mean, query_basis, steps, fields), k_cache, num_qo_heads)
    words = side["codes"].shape[-1] if "codes" in side else 0
    max_fields = side["fields"].shape[-2] if selector == "sketch" else 0
    num_layers = side["fields"].numel() - 1 if selector in ("sign", "hash") else 0
    is_split = target == "sdpa"
    offsets = (ctypes.c_int64 * len(counter_offsets))(*counter_offsets)
    stride = (group + 1) * kv_indices.stride(0)
    args = _DecodeArgs(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), kv_indices.data_ptr(), seq_lens.data_ptr(),
        *(side[name].data_ptr() if name in side else None for name in SIDE),
        params.data_ptr(), covered.data_ptr(), out.data_ptr(),
        stats.data_ptr(), counters.data_ptr(), ctypes.addressof(offsets), budget_edges.data_ptr(),
        error_edges.data_ptr(), audit_edges.data_ptr(), _reserve(batch * num_kv_heads * stride),
        batch, num_qo_heads, num_kv_heads, head_dim, kv_indices.stride(0), max_fields, words,
        budget_edges.numel(), error_edges.numel(), audit_edges.numel(), layer_id, seed & 0xFFFFFFFF, sink, window,
        dense_below, top_k_count, pilot_min, stride, seq_lens.dtype == torch.int64,
        q.dtype == torch.bfloat16, sampler == "uniform", TARGETS.index(target), SELECTOR_NUMBERS[selector],
        torch.get_num_threads(),
        sm_scale, top_k_share, pilot, cap, floor, audit_rate,
        layout.SPLIT_TABLE if is_split else layout.TABLE, layout.SPLIT_LOG if is_split else layout.LOG,
        layout.TABLE_POINTS, layout.TABLE_STEPS_PER_UNIT, group_score == "mean",
        side["norms"].shape[-1] if "norms" in side else 0, num_layers,
    )  # fmt: skip
    build.library().vattn_decode(ctypes.byref(args))


def _side_data(
    selector: str, given: tuple[Tensor | None, ...], k_cache: Tensor, num_qo_heads: int
) -> dict[str, Tensor]:
    """The side-data arguments that a selector reads, checked."""
    side = needed_side(selector, k_cache, given)
    for name, tensor in side.items():
        check_contiguous(name, tensor)
    if selector in ("sign", "hash"):
        check_nets(side["query_basis"], side["fields"], k_cache.shape[2])
        require(
            side["query_basis"].shape[0] == num_qo_heads,
            "{} query nets for {} query heads",
            *(side["query_basis"].shape[0], num_qo_heads),
        )
    return side


def _check_encoded(selector: str, k_cache: Tensor, **side: Tensor) -> None:
    check_side(selector, k_cache, side)
    for name, tensor in side.items():
        check_contiguous(name, tensor)


def encode(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, mean: Tensor, key_basis: Tensor, steps: Tensor, fields: Tensor,
    codes: Tensor, norms: Tensor, valid: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.encode`."""
    _check_cache(k_cache, v_cache, k_scale, v_scale)
    check_slots(slots)
    tables = {"mean": mean, "key_basis": key_basis, "steps": steps, "fields": fields}
    _check_encoded("sketch", k_cache, codes=codes, norms=norms, valid=valid, **tables)
    args = _EncodeArgs(
        k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), mean.data_ptr(), key_basis.data_ptr(),
        steps.data_ptr(), fields.data_ptr(), codes.data_ptr(), norms.data_ptr(), valid.data_ptr(), slots.numel(),
        k_cache.shape[1], k_cache.shape[2], steps.shape[-1], codes.shape[-1], k_cache.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode(ctypes.byref(args))


def encode_layers(
    k_caches: list[Tensor], v_caches: list[Tensor], slots: Tensor, mean: Tensor, key_basis: Tensor, steps: Tensor,
    fields: Tensor, codes: Tensor, norms: Tensor, valid: Tensor, *, k_scales: list[float] | None = None,
    v_scales: list[float] | None = None,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.encode_layers`."""
    ones = [1.0] * len(k_caches)
    scales = k_scales or ones, v_scales or ones
    tensors = (k_caches, v_caches, mean, key_basis, steps, fields, codes, norms, valid)
    for k_cache, v_cache, *one, k_scale, v_scale in zip(*tensors, *scales, strict=True):
        encode(k_cache, v_cache, slots, *one, k_scale=k_scale, v_scale=v_scale)


def encode_signature(
    k_cache: Tensor, slots: Tensor, mean: Tensor, nets: Tensor, widths: Tensor, codes: Tensor, norms: Tensor,
    valid: Tensor, centred: bool,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.encode_signature`."""
    _check_cache(k_cache, k_cache)
    check_slots(slots)
    _check_encoded("sign", k_cache, codes=codes, norms=norms, valid=valid, mean=mean)
    bits = check_nets(nets, widths, k_cache.shape[2])[-1]
    check_signatures(nets, bits, codes, k_cache.shape[1])
    args = _SignatureArgs(
        k_cache.data_ptr(), slots.data_ptr(), mean.data_ptr(), nets.data_ptr(), widths.data_ptr(), codes.data_ptr(),
        norms.data_ptr(), valid.data_ptr(), slots.numel(), k_cache.shape[1], k_cache.shape[2], nets.shape[0],
        widths.numel() - 1, codes.shape[-1], centred, k_cache.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode_signature(ctypes.byref(args))


def encode_pages(k_cache: Tensor, v_cache: Tensor, slots: Tensor, bounds: Tensor, norms: Tensor, valid: Tensor) -> None:
    """CPU implementation of `vattn_kernels.ops.encode_pages`."""
    _check_cache(k_cache, v_cache)
    check_slots(slots)
    _check_encoded("quest", k_cache, codes=bounds, norms=norms, valid=valid)
    args = _PageArgs(
        k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), bounds.data_ptr(), norms.data_ptr(),
        valid.data_ptr(), slots.numel(), valid.shape[0], k_cache.shape[1], k_cache.shape[2],
        k_cache.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode_pages(ctypes.byref(args))
