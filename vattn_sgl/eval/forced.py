"""Next-token distributions when every layer attends by a method, each position forced on the text before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vattn_sgl.eval import capture
from vattn_sgl.eval.capture import Captured
from vattn_sgl.eval.methods import Attention, Method, Rows
from vattn_sgl.eval.selectors import Adapter


@dataclass
class Forced:
    """Next tokens of some positions, compared with dense.

    Attributes
    ----------
    kl : torch.Tensor
        float64 ``[num_positions]``, KL(dense, method) in nats.
    agrees : torch.Tensor
        bool ``[num_positions]``: the most likely token is dense's.
    loss, dense_loss : torch.Tensor
        float64 ``[num_positions]``, negative log-probability of the text's next token; NaN at the text's end.
    density : torch.Tensor
        float64 ``[num_positions]``, mean over layers and heads.
    """

    kl: torch.Tensor
    agrees: torch.Tensor
    loss: torch.Tensor
    dense_loss: torch.Tensor
    density: torch.Tensor


@torch.inference_mode()
def run(model: Any, attention: Attention, method: Method, adapter: Adapter, chosen: torch.Tensor) -> Forced:
    """Decode one token at each chosen position, as so many requests that share the text's dense K and V as prefix.

    Each request's own K and V come from its own hidden state, so an error of one layer reaches the next. They are
    written to the free slots of the captured text, and coded there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that was captured.
    attention : Attention
        Over the captured text.
    method : Method
        How every layer attends.
    adapter : Adapter
        Selector, attached to the text.
    chosen : torch.Tensor
        int64 ``[num_positions]`` indices into ``captured.positions``.
    """
    captured = attention.captured
    rows, own = decode_rows(captured, chosen)
    positions = captured.positions[chosen]
    density = torch.zeros(chosen.numel(), dtype=torch.float64)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        captured.k[layer, own], captured.v[layer, own] = k, v
        adapter.write(layer, own)
        step = Rows(layer, q.contiguous(), rows.kv_indices, rows.seq_lens)
        out, stats = attention.attend(method, adapter, step)
        density.add_(stats[..., 0].double().mean(1) / attention.geometry.num_layers)
        return out

    with capture.attention(model, attend):
        hidden = capture.forward(model, captured.tokens[positions], positions)
    # Normalised again in float64, so that a divergence of rounding errors is not negative.
    got, want = (
        torch.log_softmax(x.double(), -1) for x in (capture.log_probs(model, hidden), captured.log_probs[chosen])
    )
    kl = (want.exp() * (want - got)).sum(-1)
    last = positions + 1 >= captured.tokens.numel()
    following = captured.tokens[(positions + 1).clamp(max=captured.tokens.numel() - 1)][:, None]
    loss, dense_loss = ((-x.gather(1, following)[:, 0]).masked_fill(last, torch.nan) for x in (got, want))
    return Forced(kl, got.argmax(-1) == want.argmax(-1), loss, dense_loss, density)


def decode_rows(captured: Captured, chosen: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """Slots of each chosen position's request: the text before it, then a free slot of its own.

    Parameters
    ----------
    captured : Captured
        The text.
    chosen : torch.Tensor
        int64 ``[batch]`` indices into ``captured.positions``.

    Returns
    -------
    Rows
        Of layer 0, without queries.
    torch.Tensor
        int64 ``[batch]``, the own slots.
    """
    positions = captured.positions[chosen]
    own = captured.tokens.numel() + torch.arange(chosen.numel())
    slots = torch.arange(int(positions.max()) + 1, dtype=torch.int32).repeat(chosen.numel(), 1)
    slots.scatter_(1, positions[:, None], own[:, None].int())
    return Rows(0, torch.empty(0), slots, positions + 1), own
