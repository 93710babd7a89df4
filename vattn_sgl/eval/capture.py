"""Queries, keys and values of a real model, as its attention sees them: after RoPE, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from vattn_kernels.rope import Rope
from vattn_sgl import model_folder, texts

# ``attend(layer, q, k, v)`` with ``[T, heads, head_dim]`` tensors gives ``[T, num_qo_heads, head_dim]``.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
IMPLEMENTATION = "vattn_eval"


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's attention.

    Attributes
    ----------
    num_layers, num_qo_heads, num_kv_heads, head_dim : int
        As in the model's configuration.
    """

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def sm_scale(self) -> float:
        """Factor of the logits."""
        return float(self.head_dim**-0.5)


@dataclass
class Captured:
    """Attention of one text in every layer.

    Attributes
    ----------
    tokens : torch.Tensor
        int64 ``[num_tokens]``.
    k, v : torch.Tensor
        float32 ``[num_layers, num_tokens + num_positions, num_kv_heads, head_dim]``; the slots behind the text's are
        free.
    q : torch.Tensor
        float32 ``[num_layers, num_positions, num_qo_heads, head_dim]``.
    positions : torch.Tensor
        int64 ``[num_positions]``; the query at position p sees the p + 1 tokens up to and with its own.
    log_probs : torch.Tensor
        float32 ``[num_positions, vocab]``, dense next-token distributions at ``positions``.
    """

    tokens: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    positions: torch.Tensor
    log_probs: torch.Tensor


def load_model(path: Path) -> Any:
    """A causal model in float32 whose attention `attention` replaces.

    Parameters
    ----------
    path : pathlib.Path
        Hugging Face folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def geometry(model: Any) -> Geometry:
    """Shape of the model's attention."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Geometry(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, head_dim)


def rope(model: Any, num_positions: int) -> Rope:
    """Rotation of the model's queries and keys at positions below ``num_positions``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From `load_model`; of a family whose layers share one ``rotary_emb`` over halves, as Llama's do.
    num_positions : int
        Positions, from 0.
    """
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(num_positions)[None])
    half = cos.shape[-1] // 2
    return Rope.from_cache(torch.cat([cos[0, :, :half], sin[0, :, :half]], -1), geometry(model).head_dim, True)


def token_ids(path: Path, *names: str) -> list[int]:
    """Tokens of shipped texts, one after another.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model whose tokenizer is used.
    *names : str
        See `vattn_sgl.texts.load`.
    """
    tokenizer = model_folder.load_tokenizer(path)
    return [int(i) for name in names for i in tokenizer(texts.load(name), verbose=False).input_ids]


@contextmanager
def attention(model: Any, attend: Attend) -> Iterator[None]:
    """Replace the attention of every layer while the context lasts; batch 1.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From `load_model`.
    attend : callable
        ``attend(layer, q, k, v)``, each ``[T, heads, head_dim]``, after RoPE; returns ``[T, num_qo_heads, head_dim]``.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        return attend(module.layer_idx, *rows)[None], None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, forward)
    model.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention over ``[T, heads, head_dim]`` tensors, grouped queries."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def forward(model: Any, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states ``[T, hidden]`` of a text, or of tokens at given positions, without a cache."""
    ids = None if positions is None else positions[None]
    return model.model(input_ids=tokens[None], position_ids=ids, use_cache=False).last_hidden_state[0]


def log_probs(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities float32 ``[T, vocab]`` of hidden states ``[T, hidden]``."""
    return torch.log_softmax(model.lm_head(hidden).float(), -1)


@torch.inference_mode()
def observe(
    model: Any, tokens: Sequence[int], see: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> None:
    """Show ``see(layer, q, k, v)`` the queries, keys and values of a text, layer by layer."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        see(layer, q, k, v)
        return dense(q, k, v)

    with attention(model, attend):
        forward(model, torch.tensor(tokens))


@torch.inference_mode()
def capture(model: Any, tokens: Sequence[int], positions: Sequence[int]) -> Captured:
    """Run a text densely and keep K, V of every token, and Q and the next-token distribution of some positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From `load_model`.
    tokens : sequence of int
        The text.
    positions : sequence of int
        Positions whose queries are kept.

    Returns
    -------
    Captured

    Raises
    ------
    ValueError
        If a position is not in the text.
    """
    if not positions or min(positions) < 0 or max(positions) >= len(tokens):
        raise ValueError(f"positions must be in [0, {len(tokens)}), got {list(positions)[:8]}")
    g, ids, at = geometry(model), torch.tensor(tokens), torch.tensor(positions)
    keys = torch.zeros(g.num_layers, len(tokens) + len(positions), g.num_kv_heads, g.head_dim)
    values = torch.zeros_like(keys)
    queries = torch.empty(g.num_layers, len(positions), g.num_qo_heads, g.head_dim)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys[layer, : k.shape[0]], values[layer, : v.shape[0]], queries[layer] = k, v, q[at]
        return dense(q, k, v)

    with attention(model, attend):
        hidden = forward(model, ids)
    return Captured(ids, keys, values, queries, at, log_probs(model, hidden[at]))


@torch.inference_mode()
def continue_densely(model: Any, prompt: Sequence[int], count: int) -> Captured:
    """Continue a prompt greedily by dense attention, past any end token, and keep what `capture` keeps.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From `load_model`.
    prompt : sequence of int
        The prompt.
    count : int
        Tokens to add, at least 2.

    Returns
    -------
    Captured
        ``tokens`` are the prompt and its continuation but for the last token; ``positions`` are those of the
        continuation's tokens.
    """
    g, first, total = geometry(model), len(prompt), len(prompt) + count - 1
    keys = torch.zeros(g.num_layers, total + count - 1, g.num_kv_heads, g.head_dim)
    values = torch.zeros_like(keys)
    queries = torch.empty(g.num_layers, count - 1, g.num_qo_heads, g.head_dim)
    tokens, found = torch.empty(total, dtype=torch.int64), []
    tokens[:first] = torch.tensor(prompt)
    begin = 0

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        end = begin + k.shape[0]
        keys[layer, begin:end], values[layer, begin:end] = k, v
        if begin == 0:
            return dense(q, k, v)
        queries[layer, begin - first] = q[0]
        # The heads of a group as so many queries of their KV head: half the time of repeating K and V for each.
        q = q.view(1, g.num_kv_heads, g.group, g.head_dim)
        k, v = (x[layer, :end].transpose(0, 1)[None] for x in (keys, values))
        return functional.scaled_dot_product_attention(q, k, v).view(1, g.num_qo_heads, g.head_dim)

    with attention(model, attend):
        following = log_probs(model, forward(model, tokens[:first])[-1:]).argmax(-1)
        for begin in range(first, total):
            tokens[begin] = following
            found.append(log_probs(model, forward(model, following, torch.tensor([begin]))))
            following = found[-1].argmax(-1)
    return Captured(tokens, keys, values, queries, torch.arange(first, total), torch.cat(found))
