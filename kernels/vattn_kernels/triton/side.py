"""Side data of a selector as the launches take them, checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vattn_kernels.checks import SIDE_DTYPES, check_bounds, check_nets, check_tensor, needed_side, require
from vattn_kernels.ops import SELECTORS
from vattn_kernels.signature import WORD_BITS
from vattn_kernels.sketch import GROUPS_PER_WORD

WORDS = (1, 2, 4)


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


def by_head(name: str, side: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse side data of another dtype or shape, or of which one head's rows do not lie side by side."""
    require(
        side.dtype == SIDE_DTYPES[name] and side.shape == shape and side.stride(2) == 1 and side.stride(0) == shape[2],
        "{} must lie by head, then slot: {} of strides {} and shape {}, expected {} of shape {}",
        *(name, side.dtype, side.stride(), tuple(side.shape), SIDE_DTYPES[name], shape),
    )


def check_codes(
    codes: Tensor, norms: Tensor, mean: Tensor, basis: str, bases: Tensor, steps: Tensor, fields: Tensor,
    k_cache: Tensor,
) -> None:  # fmt: skip
    """Refuse side data and tables of a sketch that the kernels do not read; ``basis`` names which bases."""
    slots, heads, head_dim = k_cache.shape
    require(codes.shape[-1] in WORDS, "codes of {} words, expected {}", codes.shape[-1], WORDS)
    by_head("codes", codes, (slots, heads, codes.shape[-1]))
    by_head("norms", norms, (slots, heads, 2))
    coded = steps.shape[-1]
    check_tensor("mean", mean, SIDE_DTYPES["mean"], (heads, head_dim))
    check_tensor(basis, bases, SIDE_DTYPES["query_basis"], (heads, head_dim, head_dim))
    check_tensor("steps", steps, SIDE_DTYPES["steps"], (heads, coded))
    check_tensor("fields", fields, SIDE_DTYPES["fields"], (heads, coded, 3))


def check_pages(bounds: Tensor, k_cache: Tensor) -> None:
    """Refuse page bounds that the kernels do not read."""
    check_bounds(bounds, k_cache)
    require(bounds[0, 0].is_contiguous(), "both bounds of a page must lie together, got strides {}", bounds.stride())


def sizes_of(widths: Tensor, nets: Tensor, head_dim: int) -> tuple[int, int, int]:
    """Widths of two hidden layers, 0 for those that there are not, and of the outputs."""
    where = widths.device
    require(where.type == "cpu", "the widths of nets lie on {}; they shape launches, so keep them on a CPU", where)
    _, *hidden, last = check_nets(nets, widths, head_dim)
    first, second = (*hidden, 0, 0)[:2]
    return first, second, last


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
    given = needed_side(selector, (codes, norms, valid, mean, query_basis, steps, fields))
    if selector == "oracle":
        return Side(k_cache, None, None, None, k_cache.stride(0), k_cache.stride(1), 0, 1, 1, 1)
    codes, norms, mean, steps = given["codes"], given["norms"], given["mean"], given["steps"]
    slots, heads, head_dim = k_cache.shape
    strides = codes.stride(0), codes.stride(1), norms.stride(1)
    if selector == "sketch":
        check_codes(codes, norms, mean, "query_basis", given["query_basis"], steps, given["fields"], k_cache)
        words = codes.shape[-1]
        return Side(codes, norms, None, fields, *strides, words, GROUPS_PER_WORD * words, steps.shape[-1])
    by_head("norms", norms, (slots, heads, 1))
    check_tensor("mean", mean, SIDE_DTYPES["mean"], (heads, head_dim))
    check_tensor("valid", given["valid"], SIDE_DTYPES["valid"], (slots,))
    check_tensor("steps", steps, SIDE_DTYPES["steps"], (heads, steps.shape[-1]))
    if selector == "quest":
        check_pages(codes, k_cache)
        return Side(codes, norms, valid, None, *strides, 1, 1, 1)
    nets = given["query_basis"]
    sizes = sizes_of(given["fields"], nets, head_dim)
    words, own, group = codes.shape[-1], sizes[-1] // WORD_BITS, q.shape[1] // heads
    require(
        words in (own, group * own) and codes.stride(2) == 1,
        "signatures of {} words, queries of {}: expected one signature a KV head, or one a query head", words, own,
    )  # fmt: skip
    require(nets.shape[0] == q.shape[1], "{} query nets for {} query heads", nets.shape[0], q.shape[1])
    return Side(codes, norms, valid, None, *strides, words, own, 1, nets, sizes)
