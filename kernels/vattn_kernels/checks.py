"""Checks of arguments that the CPU's and the GPU's ops share."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from vattn_kernels import params as layout
from vattn_kernels.line import LINE_WIDTH
from vattn_kernels.pages import PAGE
from vattn_kernels.quantiles import TARGETS
from vattn_kernels.signature import MAX_BITS, MAX_LAYERS, MAX_WIDTH, WORD_BITS

SAMPLERS = ("proportional", "uniform")
GROUP_SCORES = ("max", "mean")
MAX_GROUP = 16
INT32_END = 1 << 31
# Columns of ``stats``: realized density, budget b in tokens, relative half-width, index into `ops.OUTCOMES`, tokens
# read, share of the softmax mass that was estimated rather than read for certain.
STATS = ("density", "budget", "half_width", "outcome", "read", "residual_mass")
OUTCOMES = ("certified", "uncertified", "capped", "dense")
READ_KINDS = ("sink", "window", "top_k", "sample", "dense")
# Counters of audits and their violations, and of a histogram beside its borders: its sum, and its overflow.
AUDITS, HISTOGRAM = 2, 2
# Of a cache that GPU kernels read beside queries of two bytes.
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# Side-data arguments of ``decode``, and those that each selector cannot do without.
SIDE = ("codes", "norms", "valid", "mean", "query_basis", "steps", "fields")
SIDE_DTYPES = {
    **dict.fromkeys(("codes", "fields"), torch.int32),
    **dict.fromkeys(("norms", "valid"), torch.uint8),
    **dict.fromkeys(("mean", "query_basis", "key_basis", "steps"), torch.float32),
}
NEEDED = dict.fromkeys(("sketch", "sign", "hash"), SIDE) | {
    "oracle": (),
    "quest": ("codes", "norms", "valid", "mean", "steps"),
}


def require(condition: bool, message: str, *values: object) -> None:
    """Raise unless ``condition`` holds.

    Parameters
    ----------
    condition : bool
        What is expected.
    message : str
        What was wrong and what was expected, with ``{}`` for each of ``values``: an op checks some twenty conditions a
        layer and step, so a message is put together only where it is raised.
    *values : object
        Of the message.

    Raises
    ------
    ValueError
        With the message.
    """
    if not condition:
        raise ValueError("vattn: " + message.format(*values))


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor that is not contiguous, of ``dtype`` and of ``shape``, in which None is any size.

    Parameters
    ----------
    name : str
        Of the argument.
    tensor : torch.Tensor
        The argument.
    dtype : torch.dtype
        Expected.
    shape : tuple of int or None
        Expected.

    Raises
    ------
    ValueError
        If it is another.
    """
    check_contiguous(name, tensor)
    check_shape(name, tensor, dtype, shape)


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements do not lie side by side."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"vattn: {name} must be contiguous, got shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )


def check_shape(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor that is not of ``dtype`` and of ``shape``, as `check_tensor` does, whatever its strides."""
    sizes = tensor.shape
    fits = sizes == shape or (
        len(sizes) == len(shape)
        and all(wanted is None or size == wanted for size, wanted in zip(sizes, shape, strict=True))
    )
    if not (fits and tensor.dtype == dtype):
        raise ValueError(f"vattn: {name} is {tensor.dtype} of shape {tuple(sizes)}, expected {dtype} of shape {shape}")


def check_slots(slots: Tensor) -> None:
    """Refuse slots to encode that are no row of int64."""
    check_tensor("slots", slots, torch.int64, (None,))


def check_cache(k_cache: Tensor, v_cache: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a KV cache of another layout than ``[slots, num_kv_heads, head_dim]`` in one of ``dtypes``."""
    dtype, shape = k_cache.dtype, k_cache.shape
    require(dtype in dtypes, "the KV cache is {}, expected one of {}", dtype, dtypes)
    require(dtype == v_cache.dtype, "k_cache is {} but v_cache is {}", dtype, v_cache.dtype)
    require(len(shape) == 3, "k_cache has shape {}, expected (slots, heads, head_dim)", tuple(shape))
    require(shape == v_cache.shape, "k_cache has shape {}, v_cache {}; expected one shape", shape, v_cache.shape)
    require(k_cache.is_contiguous() and v_cache.is_contiguous(), "k_cache and v_cache must be contiguous")


def check_decode(
    q: Tensor, k_cache: Tensor, kv_indices: Tensor, seq_lens: Tensor, params: Tensor, covered: Tensor,
    budget_edges: Tensor, error_edges: Tensor, audit_edges: Tensor, out: Tensor, stats: Tensor, counters: Tensor,
    counter_offsets: list[int], target: str,
) -> None:  # fmt: skip
    """Refuse arguments of ``decode`` that no device serves."""
    require(q.dim() == 3 and q.shape[0] > 0, "q has shape {}, expected (batch, heads, head_dim)", tuple(q.shape))
    batch, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    require(k_cache.shape[2] == head_dim, "q has head_dim {}, the KV cache {}", head_dim, k_cache.shape[2])
    require(
        k_cache.dtype in (q.dtype, *FP8_DTYPES), "q is {}, the KV cache {}; expected one dtype", q.dtype, k_cache.dtype
    )
    require(
        kv_heads > 0 and heads % kv_heads == 0 and heads // kv_heads <= MAX_GROUP,
        "{} query heads over {} KV heads: the group must be whole and at most {}",
        *(heads, kv_heads, MAX_GROUP),
    )
    require(
        kv_indices.dtype == torch.int32
        and kv_indices.dim() == 2
        and kv_indices.shape[0] == batch
        and kv_indices.shape[1] > 0
        and kv_indices.stride(1) == 1,
        "kv_indices is {} of shape {} and strides {}, expected int32 of {} rows, with unit stride along positions",
        *(kv_indices.dtype, tuple(kv_indices.shape), kv_indices.stride(), batch),
    )
    require(seq_lens.dtype in (torch.int32, torch.int64), "seq_lens must be int32 or int64, got {}", seq_lens.dtype)
    histograms = [edges.numel() + HISTOGRAM for edges in (budget_edges, error_edges, audit_edges)]
    blocks = (1, len(READ_KINDS), len(OUTCOMES), *histograms[:2], AUDITS, histograms[2])
    require(len(counter_offsets) == len(blocks), "counter_offsets are {}, not {}", len(counter_offsets), len(blocks))
    fits = all(0 <= at <= counters.numel() - size for at, size in zip(counter_offsets, blocks, strict=True))
    require(fits, "counter_offsets {} of blocks {} leave {} counters", counter_offsets, blocks, counters.numel())
    for name, tensor, dtype, shape in (
        ("q", q, q.dtype, (batch, heads, head_dim)),
        ("seq_lens", seq_lens, seq_lens.dtype, (batch,)),
        ("params", params, torch.float32, (layout.PARAMS_WIDTH,)),
        ("covered", covered, torch.int32, (1,)),
        ("budget_edges", budget_edges, torch.float32, (None,)),
        ("error_edges", error_edges, torch.float32, (None,)),
        ("audit_edges", audit_edges, torch.float32, (None,)),
        ("out", out, q.dtype, (batch, heads, head_dim)),
        ("stats", stats, torch.float32, (batch, heads, len(STATS))),
        ("counters", counters, torch.float64, (None,)),
    ):
        check_tensor(name, tensor, dtype, shape)
    require(target in TARGETS, "target {!r} is unknown, expected one of {}", target, TARGETS)


def check_settings(
    sm_scale: float, sink: int, window: int, pilot: float, pilot_min: int, cap: float, floor: float, audit_rate: float,
    k_scale: float, v_scale: float,
) -> None:  # fmt: skip
    """Refuse numbers that no step can be taken with; `vattn_sgl.config.Settings` refuses more of them."""
    require(0 <= sink < INT32_END and 0 <= window < INT32_END, "sink {}, window {}: 0 to 2^31 - 1", sink, window)
    require(
        pilot_min >= 4 and 0 < pilot <= 1,
        "pilot_min {} must be at least 4, pilot {} above 0, at most 1",
        pilot_min,
        pilot,
    )
    require(0 < cap <= 1 and 0 <= floor <= 1, "cap {} must be above 0 and floor {} 0 or more, at most 1", cap, floor)
    require(0 <= audit_rate <= 1, "audit_rate {} must be 0 to 1", audit_rate)
    for name, scale in (("sm_scale", sm_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        require(0 < scale < math.inf, "{} {} must be above 0 and finite", name, scale)


def needed_side(selector: str, k_cache: Tensor, given: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The side-data arguments that a selector reads, by name; refuses a call that lacks one, see `check_side`."""
    named = dict(zip(SIDE, given, strict=True))
    side = {name: tensor for name in NEEDED[selector] if (tensor := named[name]) is not None}
    missing = [name for name in NEEDED[selector] if name not in side]
    require(not missing, "selector {!r} needs side data, got no {}", selector, ", ".join(missing))
    check_side(selector, k_cache, side)
    return side


def check_side(selector: str, k_cache: Tensor, side: dict[str, Tensor]) -> None:
    """Refuse side data or tables of another dtype or shape than a selector's, by argument of ``decode`` or ``encode``.

    The size of nets is left to `check_nets`, and strides to each device, which reads what lies in its own order.
    """
    slots, heads, head_dim = k_cache.shape
    shapes: dict[str, tuple[int | None, ...]] = {
        "codes": (slots, heads, None),
        "norms": (slots, heads, 1),
        "valid": (slots,),
        "mean": (heads, head_dim),
        "steps": (heads, LINE_WIDTH),
        "query_basis": (None, None),
        "fields": (None,),
    }
    if selector == "sketch":
        basis, coded = (heads, head_dim, head_dim), side["steps"].shape[-1]
        shapes |= {"norms": (slots, heads, 2), "query_basis": basis, "key_basis": basis}
        shapes |= {"steps": (heads, coded), "fields": (heads, coded, 3)}
    for name, tensor in side.items():
        if (name, selector) == ("codes", "quest"):
            check_bounds(tensor, k_cache)
        else:
            check_shape(name, tensor, SIDE_DTYPES[name], shapes[name])


def check_bounds(bounds: Tensor, k_cache: Tensor) -> None:
    """Refuse page bounds of another dtype than a cache's, or of too few pages."""
    slots, heads, head_dim = k_cache.shape
    check_shape("page bounds", bounds, k_cache.dtype, (None, heads, 2, head_dim))
    require(bounds.shape[0] * PAGE >= slots, "{} pages do not cover {} slots", bounds.shape[0], slots)


def check_nets(nets: Tensor, widths: Tensor, head_dim: int) -> list[int]:
    """Widths of nets from head_dim to the bits of a signature; refuses nets that do not fit them."""
    check_tensor("widths", widths, torch.int32, (None,))
    sizes: list[int] = widths.tolist()
    parameters = sum((inner + 1) * outer for inner, outer in itertools.pairwise(sizes))
    require(2 <= len(sizes) <= MAX_LAYERS + 1, "{} layers of a net: 1 to {} are supported", len(sizes) - 1, MAX_LAYERS)
    require(max(sizes) <= MAX_WIDTH, "a net of width {} is above {}", max(sizes), MAX_WIDTH)
    require(sizes[0] == head_dim, "nets take {} inputs, keys have {}", sizes[0], head_dim)
    fits = sizes[-1] % WORD_BITS == 0 and sizes[-1] <= MAX_BITS
    require(fits, "{} bits: multiples of 32 up to {}", sizes[-1], MAX_BITS)
    require(nets.shape[1] == parameters, "nets have {} parameters, widths {} need {}", nets.shape[1], sizes, parameters)
    require(nets.dtype == torch.float32 and nets.is_contiguous(), "nets must be contiguous float32")
    return sizes


def check_signatures(nets: Tensor, bits: int, codes: Tensor, num_kv_heads: int) -> None:
    """Refuse signatures of another size than the nets of keys give."""
    require(
        nets.shape[0] % num_kv_heads == 0 and codes.shape[-1] * WORD_BITS * num_kv_heads == nets.shape[0] * bits,
        "{} nets of {} bits do not fill {} words of {} KV heads",
        *(nets.shape[0], bits, codes.shape[-1], num_kv_heads),
    )
