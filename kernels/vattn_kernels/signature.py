"""Sign signatures of keys and queries: random hyperplanes (``sign``) and HashAttention's learned nets (``hash``).

A net is 1-3 linear layers with SiLU between them; the signs of its outputs are the signature. The nets of a layer are
packed as float32 ``[heads, parameters]``: per layer the matrix ``[d_in, d_out]`` by rows, then the bias ``[d_out]``.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn.functional import silu

WORD_BITS = 32
MAX_BITS = 128
MAX_LAYERS = 3
MAX_WIDTH = 512


def pack(matrices: list[torch.Tensor], biases: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed nets of one layer.

    Parameters
    ----------
    matrices : list of torch.Tensor
        ``[heads, d_in, d_out]`` each.
    biases : list of torch.Tensor
        ``[heads, d_out]`` each.

    Returns
    -------
    torch.Tensor
        float32 ``[heads, parameters]``.
    torch.Tensor
        int32 ``[layers + 1]`` widths, from head_dim to the bits of a signature.
    """
    parts = [part.flatten(1) for pair in zip(matrices, biases, strict=True) for part in pair]
    widths = [matrices[0].shape[1], *(m.shape[2] for m in matrices)]
    return torch.cat(parts, 1).float().contiguous(), torch.tensor(widths, dtype=torch.int32)


def random_nets(seed: int, head_dim: int, bits: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nets of one layer that project on ``bits`` Gaussian directions, the same for all heads.

    Parameters
    ----------
    seed : int
        Of the directions.
    head_dim, bits, heads : int
        Sizes.

    Returns
    -------
    torch.Tensor, torch.Tensor
        As from `pack`.
    """
    directions = torch.randn(head_dim, bits, generator=torch.Generator().manual_seed(seed))
    matrix = directions.expand(heads, head_dim, bits)
    return pack([matrix], [torch.zeros(heads, bits)])


def outputs(x: torch.Tensor, net: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Outputs of one head's net.

    Parameters
    ----------
    x : torch.Tensor
        ``[n, widths[0]]``; computed in its dtype.
    net : torch.Tensor
        ``[parameters]``.
    widths : list of int
        From `pack`.

    Returns
    -------
    torch.Tensor
        ``[n, widths[-1]]``.
    """
    at = 0
    for layer, (inner, outer) in enumerate(itertools.pairwise(widths)):
        matrix = net[at : at + inner * outer].view(inner, outer).to(x.dtype)
        bias = net[at + inner * outer : at + (inner + 1) * outer].to(x.dtype)
        x = (silu(x) if layer else x) @ matrix + bias
        at += (inner + 1) * outer
    return x


def to_words(signs: torch.Tensor) -> torch.Tensor:
    """Bits ``[..., bits]`` (bool) as int32 words ``[..., bits / 32]``, lowest bit first."""
    shifts = torch.arange(WORD_BITS, device=signs.device)
    words = (signs.unflatten(-1, (-1, WORD_BITS)).long() << shifts).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def to_bits(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_words`."""
    shifts = torch.arange(WORD_BITS, device=words.device)
    return ((words.long()[..., None] >> shifts) & 1).bool().flatten(-2)


def agreement(bits: int, angular: bool) -> torch.Tensor:
    """Similarity in [-1, 1] by number of differing bits, float64 ``[bits + 1]``.

    Parameters
    ----------
    bits : int
        Of a signature.
    angular : bool
        True: cosine of the angle that random hyperplanes estimate (Charikar 2002). False: agreeing less differing
        bits, as a share (HashAttention).
    """
    share = torch.arange(bits + 1, dtype=torch.float64) / bits
    return torch.cos(math.pi * share) if angular else 1 - 2 * share


def features(
    q: torch.Tensor,
    query_bits: torch.Tensor,
    key_bits: torch.Tensor,
    key_norm: torch.Tensor,
    mean: torch.Tensor,
    angular: bool,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw score, unit and base of tokens from their signatures.

    Parameters
    ----------
    q : torch.Tensor
        ``[queries, head_dim]``.
    query_bits : torch.Tensor
        bool ``[queries, bits]``.
    key_bits : torch.Tensor
        bool ``[queries or 1, n, bits]``, 1 where all queries share the keys' signatures.
    key_norm : torch.Tensor
        ``[n]`` norms of the keys less the mean key.
    mean : torch.Tensor
        ``[head_dim]`` mean key of the head.
    angular : bool
        As in `agreement`.
    sm_scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        ``[queries, n]`` agreement times unit.
    torch.Tensor
        ``[queries, n]`` unit ``sm_scale |q| |k - mean|``.
    torch.Tensor
        ``[queries]`` logit of the mean key.
    """
    ours, theirs = 2 * query_bits.to(q.dtype) - 1, 2 * key_bits.to(q.dtype) - 1  # [Q, B], [Q or 1, N, B]
    bits = query_bits.shape[-1]
    product = ours @ theirs[0].T if theirs.shape[0] == 1 else torch.einsum("qb,qnb->qn", ours, theirs)
    differing = ((bits - product) / 2).round().long()
    unit = sm_scale * q.norm(dim=-1)[:, None] * key_norm.to(q.dtype)
    return agreement(bits, angular).to(q)[differing] * unit, unit, sm_scale * (q @ mean.to(q.dtype))


def sample_features(
    q: torch.Tensor,
    k: torch.Tensor,
    mean: torch.Tensor,
    query_nets: torch.Tensor,
    key_nets: torch.Tensor,
    query_widths: list[int],
    key_widths: list[int],
    angular: bool,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`features` of sampled queries and keys of one KV head.

    Parameters
    ----------
    q, k : torch.Tensor
        ``[n, group, head_dim]`` and ``[m, head_dim]``.
    mean : torch.Tensor
        ``[head_dim]`` mean key; nets of an angular selector see the keys less it.
    query_nets, key_nets : torch.Tensor
        ``[group, parameters]`` and ``[1 or group, parameters]``.
    query_widths, key_widths : list of int
        Of the nets.
    angular, sm_scale
        As in `features`.

    Returns
    -------
    torch.Tensor, torch.Tensor, torch.Tensor
        ``[n * group, m]`` twice, ``[n * group]``.
    """
    source = k - mean if angular else k
    key_bits = [outputs(source, net, key_widths) > 0 for net in key_nets]
    norm = (k - mean).norm(dim=-1)
    per_head = []
    for g, net in enumerate(query_nets):
        signs = outputs(q[:, g], net, query_widths) > 0
        per_head.append(features(q[:, g], signs, key_bits[g % len(key_bits)][None], norm, mean, angular, sm_scale))
    raw, unit, base = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*per_head, strict=True))
    return raw, unit, base
