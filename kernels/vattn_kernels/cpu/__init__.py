"""CPU implementation of the ops: checks arguments and calls ``kernels.cpp``."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from vattn_kernels import params as layout
from vattn_kernels.cpu import build
from vattn_kernels.pages import PAGE
from vattn_kernels.quantiles import PROVABLE_SELECTORS, TARGETS
from vattn_kernels.signature import MAX_BITS, MAX_LAYERS, MAX_WIDTH

MAX_GROUP = 16
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
    "k_cache v_cache slots mean nets widths codes norms valid",
    "num_slots num_kv_heads head_dim num_nets num_layers words centred is_bf16 threads",
)
_PageArgs = _structure(
    "_PageArgs",
    "k_cache v_cache slots bounds norms valid",
    "num_slots pool_slots num_kv_heads head_dim is_bf16 threads",
)
# Numbered as in kernels.cpp, with the side-data arguments that each needs (all: codes to fields).
SELECTOR_NUMBERS = {"sketch": 0, "oracle": 1, "quest": 2, "sign": 3, "hash": 4}
_SIDE = ("codes", "norms", "valid", "mean", "query_basis", "steps", "fields")
_NEEDED = dict.fromkeys(SELECTOR_NUMBERS, _SIDE) | {"oracle": (), "quest": ("codes", "norms", "valid", "mean", "steps")}

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
    group_score: str = "max", state: Tensor | None = None, state_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.decode`; it needs no state."""
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
    _require(selector in SELECTOR_NUMBERS, f"selector {selector!r} is unknown")
    _require(group_score in ("max", "mean"), f"group_score {group_score!r} is unknown")
    _require(pilot_min >= 4 and pilot > 0, f"pilot_min {pilot_min} must be at least 4 and pilot {pilot} above 0")
    _require(params.numel() == layout.PARAMS_WIDTH, f"params has {params.numel()} values, not {layout.PARAMS_WIDTH}")
    _require(
        selector in PROVABLE_SELECTORS or float(params[layout.LOG]) == 0,
        f"bound 'bernstein' needs an upper bound of every logit, which selector {selector!r} does not have: "
        f"expected selector {', '.join(PROVABLE_SELECTORS)}",
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
        *(side[name].data_ptr() if name in side else None for name in _SIDE),
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
    named = dict(zip(_SIDE, given, strict=True))
    side = {name: tensor for name in _NEEDED[selector] if (tensor := named[name]) is not None}
    missing = [name for name in _NEEDED[selector] if name not in side]
    _require(not missing, f"selector {selector!r} needs side data, got no {', '.join(missing)}")
    for name, tensor in side.items():
        _require(tensor.is_contiguous(), f"{name} must be contiguous")
    if selector == "quest":
        codes = side["codes"]
        _require(codes.dtype == k_cache.dtype, f"page bounds are {codes.dtype}, the KV cache {k_cache.dtype}")
        _require(
            codes.shape[0] * PAGE >= k_cache.shape[0], f"{codes.shape[0]} pages do not cover {k_cache.shape[0]} slots"
        )
    if selector in ("sign", "hash"):
        _check_nets(side["query_basis"], side["fields"], k_cache.shape[2])
        _require(
            side["query_basis"].shape[0] == num_qo_heads,
            f"{side['query_basis'].shape[0]} query nets for {num_qo_heads} query heads",
        )
    return side


def _check_nets(nets: Tensor, widths: Tensor, head_dim: int) -> None:
    sizes = widths.tolist()
    parameters = sum((inner + 1) * outer for inner, outer in itertools.pairwise(sizes))
    _require(2 <= len(sizes) <= MAX_LAYERS + 1, f"{len(sizes) - 1} layers of a net: 1 to {MAX_LAYERS} are supported")
    _require(max(sizes) <= MAX_WIDTH, f"a net of width {max(sizes)} is above {MAX_WIDTH}")
    _require(sizes[0] == head_dim, f"nets take {sizes[0]} inputs, keys have {head_dim}")
    _require(sizes[-1] % 32 == 0 and sizes[-1] <= MAX_BITS, f"{sizes[-1]} bits: multiples of 32 up to {MAX_BITS}")
    _require(nets.shape[1] == parameters, f"nets have {nets.shape[1]} parameters, widths {sizes} need {parameters}")
    _require(nets.dtype == torch.float32 and nets.is_contiguous(), "nets must be contiguous float32")


def _check_slots(slots: Tensor) -> None:
    _require(slots.dtype == torch.int64 and slots.is_contiguous(), f"slots must be contiguous int64, got {slots.dtype}")


def encode(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, mean: Tensor, key_basis: Tensor, steps: Tensor, fields: Tensor,
    codes: Tensor, norms: Tensor, valid: Tensor,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.encode`."""
    _check_cache(k_cache, v_cache)
    _check_slots(slots)
    args = _EncodeArgs(
        k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), mean.data_ptr(), key_basis.data_ptr(),
        steps.data_ptr(), fields.data_ptr(), codes.data_ptr(), norms.data_ptr(), valid.data_ptr(), slots.numel(),
        k_cache.shape[1], k_cache.shape[2], steps.shape[-1], codes.shape[-1], k_cache.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode(ctypes.byref(args))


def encode_signature(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, mean: Tensor, nets: Tensor, widths: Tensor, codes: Tensor,
    norms: Tensor, valid: Tensor, centred: bool,
) -> None:  # fmt: skip
    """CPU implementation of `vattn_kernels.ops.encode_signature`."""
    _check_cache(k_cache, v_cache)
    _check_slots(slots)
    _check_nets(nets, widths, k_cache.shape[2])
    bits = int(widths[-1])
    _require(
        nets.shape[0] % k_cache.shape[1] == 0 and codes.shape[-1] * 32 * k_cache.shape[1] == nets.shape[0] * bits,
        f"{nets.shape[0]} nets of {bits} bits do not fill {codes.shape[-1]} words of {k_cache.shape[1]} KV heads",
    )
    args = _SignatureArgs(
        k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), mean.data_ptr(), nets.data_ptr(), widths.data_ptr(),
        codes.data_ptr(), norms.data_ptr(), valid.data_ptr(), slots.numel(), k_cache.shape[1], k_cache.shape[2],
        nets.shape[0], widths.numel() - 1, codes.shape[-1], centred, k_cache.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode_signature(ctypes.byref(args))


def encode_pages(k_cache: Tensor, v_cache: Tensor, slots: Tensor, bounds: Tensor, norms: Tensor, valid: Tensor) -> None:
    """CPU implementation of `vattn_kernels.ops.encode_pages`."""
    _check_cache(k_cache, v_cache)
    _check_slots(slots)
    _require(bounds.dtype == k_cache.dtype, f"page bounds are {bounds.dtype}, the KV cache {k_cache.dtype}")
    args = _PageArgs(
        k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), bounds.data_ptr(), norms.data_ptr(),
        valid.data_ptr(), slots.numel(), valid.shape[0], k_cache.shape[1], k_cache.shape[2],
        k_cache.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    build.library().vattn_encode_pages(ctypes.byref(args))
