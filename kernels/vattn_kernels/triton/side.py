"""Side data of a selector as the launches take them, checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vattn_kernels.checks import check_contiguous, check_nets, check_side, needed_side, require
from vattn_kernels.ops import SELECTORS
from vattn_kernels.signature import WORD_BITS
from vattn_kernels.sketch import GROUPS_PER_WORD, LANES

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


def check_encoded(selector: str, k_cache: Tensor, **side: Tensor) -> None:
    """Refuse side data and tables that an encoder does not write and read."""
    check_side(selector, k_cache, side)
    check_layout(selector, side)


def check_layout(selector: str, side: dict[str, Tensor]) -> None:
    """Refuse codes that the kernels do not read, by their words and strides, and tables that are not contiguous."""
    if selector == "sketch":
        words, coded = side["codes"].shape[-1], side["steps"].shape[-1]
        require(words in WORDS, "codes of {} words, expected {}", words, WORDS)
        least = LANES * GROUPS_PER_WORD * words
        require(coded >= least, "steps and fields of {} dimensions, {} words take {}", coded, words, least)
    for name, tensor in side.items():
        if name == "norms" or (name == "codes" and selector == "sketch"):
            size = tensor.shape[2]
            fits = tensor.stride(2) == 1 and tensor.stride(0) == size
            require(fits, "{} must lie by head, then slot, got strides {}", name, tensor.stride())
        elif name != "codes":
            check_contiguous(name, tensor)
        else:
            together = tensor.stride(2) == 1 if selector != "quest" else tensor[0, 0].is_contiguous()
            require(together, "{} of a slot or page must lie together, got strides {}", name, tensor.stride())


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
    given = needed_side(selector, k_cache, (codes, norms, valid, mean, query_basis, steps, fields))
    if selector == "oracle":
        return Side(k_cache, None, None, None, k_cache.stride(0), k_cache.stride(1), 0, 1, 1, 1)
    check_layout(selector, given)
    codes, norms = given["codes"], given["norms"]
    strides, words = (codes.stride(0), codes.stride(1), norms.stride(1)), codes.shape[-1]
    if selector == "sketch":
        return Side(codes, norms, None, fields, *strides, words, GROUPS_PER_WORD * words, given["steps"].shape[-1])
    if selector == "quest":
        return Side(codes, norms, valid, None, *strides, 1, 1, 1)
    nets = given["query_basis"]
    sizes = sizes_of(given["fields"], nets, k_cache.shape[2])
    own, group = sizes[-1] // WORD_BITS, q.shape[1] // k_cache.shape[1]
    require(
        words in (own, group * own),
        "signatures of {} words, queries of {}: expected one signature a KV head, or one a query head", words, own,
    )  # fmt: skip
    require(nets.shape[0] == q.shape[1], "{} query nets for {} query heads", nets.shape[0], q.shape[1])
    return Side(codes, norms, valid, None, *strides, words, own, 1, nets, sizes)
