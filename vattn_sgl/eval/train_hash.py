"""Nets for selector ``hash`` where a model's authors trained none: enough to compare with, as HashAttention trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from vattn_kernels.cache import cache_dir
from vattn_sgl.eval.capture import Geometry, observe
from vattn_sgl.selectors.calibration import model_key

BITS = 64
QUERIES, KEYS, BEST = 32, 1024, 32
LEARNING_RATE = 3e-3
# Signs have no gradient: tanh becomes them as its argument grows.
SHARPEST = 4.0


class Net(nn.Module):
    """Two linear layers a head, whose signs are the signature; starts as centred random projections."""

    def __init__(self, x: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        heads, head_dim = x.shape[1:]
        first = torch.randn(heads, head_dim, head_dim, generator=generator) / (x.std(0) * head_dim**0.5)[..., None]
        second = torch.randn(heads, head_dim, BITS, generator=generator) / head_dim**0.5
        self.matrices = nn.ParameterList([first, second])
        offset = -torch.einsum("hd,hde->he", x.mean(0), first)
        self.biases = nn.ParameterList([offset, torch.zeros(heads, BITS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs ``[n, heads, BITS]`` of ``[n, heads, head_dim]``."""
        x = torch.einsum("nhd,hde->nhe", x, self.matrices[0]) + self.biases[0]
        return torch.einsum("nhd,hde->nhe", silu(x), self.matrices[1]) + self.biases[1]


def train_layer(q: torch.Tensor, k: torch.Tensor, steps: int, seed: int = 0) -> dict[str, list[torch.Tensor]]:
    """Nets that tell a query's best keys from the others (HashAttention, arXiv 2412.14468).

    Parameters
    ----------
    q, k : torch.Tensor
        float32 ``[n, num_qo_heads, head_dim]`` and ``[n, num_kv_heads, head_dim]``, n at least `KEYS` + `QUERIES`.
    steps : int
        Of Adam, each over `QUERIES` queries and `KEYS` keys before them.
    seed : int
        Of the start and the choice.

    Returns
    -------
    dict
        ``{query_matrix, query_bias, key_matrix, key_bias}``, see `vattn_sgl.selectors.hash_weights`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    query, key = Net(q, generator), Net(k, generator)
    scale = nn.Parameter(torch.full((q.shape[1], 1, 1), 8.0))
    offset = nn.Parameter(torch.zeros(q.shape[1], 1, 1))
    optimizer = torch.optim.Adam([*query.parameters(), *key.parameters(), scale, offset], LEARNING_RATE)
    weight = torch.tensor((KEYS - BEST) / BEST)
    for step in range(steps):
        first = int(torch.randint(KEYS, tokens - QUERIES + 1, (), generator=generator))
        before = torch.randperm(first, generator=generator)[:KEYS]
        queries, keys = q[first : first + QUERIES], k[before]
        with torch.no_grad():
            logits = torch.einsum("qhd,nhd->hqn", queries, keys.repeat_interleave(group, 1))
            wanted = torch.zeros_like(logits).scatter_(-1, logits.topk(BEST).indices, 1.0)
        sharpness = SHARPEST ** (step / steps)
        ours = torch.tanh(sharpness * query(queries))
        theirs = torch.tanh(sharpness * key(keys)).repeat_interleave(group, 1)
        agreement = torch.einsum("qhb,nhb->hqn", ours, theirs) / BITS
        loss = binary_cross_entropy_with_logits(scale * agreement + offset, wanted, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        f"{side}_{part}": [p.detach() for p in parameters]
        for side, net in (("query", query), ("key", key))
        for part, parameters in (("matrix", net.matrices), ("bias", net.biases))
    }


def weights(path: Path, model: Any, geometry: Geometry, tokens: Sequence[int], steps: int) -> str:
    """File of trained nets of every layer, made once and kept in the cache.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model.
    model : transformers.PreTrainedModel
        From `vattn_sgl.eval.capture.load_model`.
    geometry : Geometry
        Of the model.
    tokens : sequence of int
        Text to train on, at least `KEYS` + `QUERIES` tokens.
    steps : int
        As in `train_layer`.
    """
    file = cache_dir() / "hash" / f"{model_key(str(path))}-{len(tokens)}-{steps}.safetensors"
    if file.exists():
        return str(file)
    g = geometry
    queries = torch.empty(g.num_layers, len(tokens), g.num_qo_heads, g.head_dim)
    keys = torch.empty(g.num_layers, len(tokens), g.num_kv_heads, g.head_dim)

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        queries[layer], keys[layer] = q, k

    observe(model, tokens, see)
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for layer in range(g.num_layers):
            trained = train_layer(queries[layer].clone(), keys[layer].clone(), steps, layer)
            found |= {f"{layer}.{name}.{i}": p for name, parts in trained.items() for i, p in enumerate(parts)}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    save_file(found, draft)
    draft.replace(file)
    return str(file)
