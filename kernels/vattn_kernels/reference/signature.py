"""Sign signatures of keys and the logits they give (selectors ``sign`` and ``hash``)."""

from __future__ import annotations

import torch

from vattn_kernels import line as lines
from vattn_kernels import signature
from vattn_kernels.reference.sketch import level, norm_of


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
    """As `vattn_kernels.ops.encode_signature`, in float64."""
    sizes = widths.tolist()
    per_head = nets.shape[0] // k_cache.shape[1]
    for slot in slots.tolist():
        for head in range(k_cache.shape[1]):
            key = k_cache[slot, head].double()
            offset = key - mean[head].double()
            source = offset if centred else key
            rows = nets[head * per_head : (head + 1) * per_head]
            signs = torch.cat([signature.outputs(source[None], net, sizes)[0] > 0 for net in rows])
            codes[slot, head] = signature.to_words(signs)
            norms[slot, head, 0] = level(offset.norm())
        valid[slot] = 1


def logits(
    q: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    mean: torch.Tensor,
    nets: torch.Tensor,
    line: torch.Tensor,
    widths: torch.Tensor,
    angular: bool,
    sm_scale: float,
) -> torch.Tensor:
    """Estimated logits of one KV head.

    Parameters
    ----------
    q : torch.Tensor
        float64 ``[group, head_dim]``.
    codes, norms : torch.Tensor
        ``[n, words]`` and ``[n, 1]`` of the tokens.
    mean, line : torch.Tensor
        One head of `vattn_kernels.line.LineTables`.
    nets : torch.Tensor
        ``[group, parameters]`` query nets of the group's heads.
    widths : torch.Tensor
        From `vattn_kernels.signature.pack`.
    angular : bool
        As in `vattn_kernels.signature.agreement`.
    sm_scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        float64 ``[group, n]``.
    """
    sizes = widths.tolist()
    query_bits = torch.cat([signature.outputs(row[None], net, sizes) > 0 for row, net in zip(q, nets, strict=True)])
    key_bits = signature.to_bits(codes).unflatten(-1, (-1, sizes[-1])).transpose(0, 1)  # [1 or G, n, bits]
    norm = norm_of(norms[:, 0])
    return lines.apply(line.double(), *signature.features(q, query_bits, key_bits, norm, mean, angular, sm_scale))
