"""Side data of a selector as the launches take them, checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vattn_kernels.checks import require
from vattn_kernels.ops import SELECTORS
from vattn_kernels.pages import PAGE
from vattn_kernels.signature import MAX_BITS, MAX_LAYERS, MAX_WIDTH, WORD_BITS
from vattn_kernels.sketch import GROUPS_PER_WORD

WORDS = (1, 2, 4)
# Arguments of ``decode`` that a selector cannot do without.
NEEDED = {
    "sketch": ("codes", "norms", "valid", "mean", "query_basis", "steps", "fields"),
    "oracle": (),
    "quest": ("codes", "norms", "valid", "mean", "steps"),
    "sign": ("codes", "norms", "valid", "mean", "query_basis", "steps", "fields"),
    "hash": ("codes", "norms", "valid", "mean", "query_basis", "steps", "fields"),
}


class Side(NamedTuple):
    """What ``select`` reads of every token, and by which tables.

    Attributes
    ----------
    rows : torch.Tensor
        Codes, signatures, page bounds or, for ``oracle``, keys.
    norms, valid, fields : torch.Tensor or None
        As for ``decode``; None where the kernels do not read them.
    row_stride, head_stride, norm_stride : int
        Entries from one row to the next and from head to head, and from head to head of the norms.
    words, groups, width : int
        Words of a token and KV head; groups of a sketch's fields, or words of one signature; coded dimensions.
    nets, sizes
        Of the queries, see `sizes_of`; None where the selector has none.
    """

    rows: Tensor
    norms: Tensor | None
    valid: Tensor | None
    fields: Tensor | None
    row_stride: int
    head_stride: int
    norm_stride: int
    words: int
    groups: int
    width: int
    nets: Tensor | None = None
    sizes: tuple[int, int, int] = (0, 0, 0)


def by_head(name: str, side: Tensor) -> None:
    """Refuse side data ``[rows, heads, n]`` of which one head's rows do not lie side by side."""
    require(
        side.stride(2) == 1 and side.stride(0) == side.shape[2],
        "{} must lie by head, then slot: strides {} of shape {}",
        *(name, side.stride(), tuple(side.shape)),
    )


def check_codes(codes: Tensor, norms: Tensor, steps: Tensor) -> None:
    """Refuse side data of a sketch that the kernels do not read."""
    require(codes.shape[-1] in WORDS, "codes of {} words, expected {}", codes.shape[-1], WORDS)
    by_head("codes", codes)
    by_head("norms", norms)
    require(steps.is_contiguous(), "steps must be contiguous")


def check_bounds(bounds: Tensor, k_cache: Tensor) -> None:
    """Refuse page bounds that are not those of a cache."""
    expected = (-(-k_cache.shape[0] // PAGE), k_cache.shape[1], 2, k_cache.shape[2])
    require(bounds.dtype == k_cache.dtype, "page bounds are {}, the KV cache {}", bounds.dtype, k_cache.dtype)
    require(tuple(bounds.shape) == expected, "page bounds of shape {}, expected {}", tuple(bounds.shape), expected)
    require(
        bounds[0, 0].is_contiguous(), "page bounds of strides {}: a page and head must lie together", bounds.stride()
    )


def sizes_of(widths: Tensor, nets: Tensor, head_dim: int) -> tuple[int, int, int]:
    """Widths of two hidden layers, 0 for those that there are not, and of the outputs."""
    where = widths.device
    require(where.type == "cpu", "the widths of nets lie on {}; they shape launches, so keep them on a CPU", where)
    first, *hidden, last = widths.tolist()
    parameters = sum((i + 1) * o for i, o in zip((first, *hidden), (*hidden, last), strict=True))
    require(len(hidden) < MAX_LAYERS, "{} layers of a net: 1 to {} are supported", len(hidden) + 1, MAX_LAYERS)
    require(max(hidden, default=0) <= MAX_WIDTH, "a net of width {} is above {}", max(hidden, default=0), MAX_WIDTH)
    require(first == head_dim, "nets take {} inputs, keys have {}", first, head_dim)
    require(last % WORD_BITS == 0 and last <= MAX_BITS, "{} bits: multiples of {} up to {}", last, WORD_BITS, MAX_BITS)
    require(
        nets.shape[1] == parameters, "nets have {} parameters, widths {} need {}", nets.shape[1], widths, parameters
    )
    require(nets.is_contiguous(), "nets must be contiguous")
    first_hidden, second_hidden = (*hidden, 0, 0)[:2]
    return first_hidden, second_hidden, last


def side_of(
    selector: str, q: Tensor, k_cache: Tensor, codes: Tensor | None, norms: Tensor | None, valid: Tensor | None,
    mean: Tensor | None, query_basis: Tensor | None, steps: Tensor | None, fields: Tensor | None,
) -> Side:  # fmt: skip
    """Side data of a call of ``decode``.

    Raises
    ------
    ValueError
        If some are missing or of another shape than the selector's.
    """
    require(selector in SELECTORS, "selector {!r} is unknown, expected one of {}", selector, SELECTORS)
    given = {
        "codes": codes, "norms": norms, "valid": valid, "mean": mean, "query_basis": query_basis, "steps": steps,
        "fields": fields,
    }  # fmt: skip
    missing = [name for name in NEEDED[selector] if given[name] is None]
    require(
        not missing, "selector {!r} needs side data, got None for {}; make it with ops.encode", selector,
        ", ".join(missing),
    )  # fmt: skip
    if selector == "oracle":
        return Side(k_cache, None, None, None, k_cache.stride(0), k_cache.stride(1), 0, 1, 1, 1)
    assert codes is not None and norms is not None and steps is not None
    if selector == "sketch":
        check_codes(codes, norms, steps)
        words = codes.shape[-1]
        strides = codes.stride(0), codes.stride(1), norms.stride(1)
        return Side(codes, norms, None, fields, *strides, words, GROUPS_PER_WORD * words, steps.shape[-1])
    by_head("norms", norms)
    require(steps.is_contiguous(), "the line must be contiguous")
    strides = codes.stride(0), codes.stride(1), norms.stride(1)
    if selector == "quest":
        check_bounds(codes, k_cache)
        return Side(codes, norms, valid, None, *strides, 1, 1, 1)
    assert query_basis is not None and fields is not None
    sizes = sizes_of(fields, query_basis, k_cache.shape[2])
    words, own, group = codes.shape[-1], sizes[-1] // WORD_BITS, q.shape[1] // k_cache.shape[1]
    require(
        words in (own, group * own) and codes.stride(2) == 1,
        "signatures of {} words, queries of {}: expected one signature a KV head, or one a query head", words, own,
    )  # fmt: skip
    require(query_basis.shape[0] == q.shape[1], "{} nets for {} query heads", query_basis.shape[0], q.shape[1])
    return Side(codes, norms, valid, None, *strides, words, own, 1, query_basis, sizes)
