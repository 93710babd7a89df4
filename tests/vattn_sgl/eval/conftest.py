"""A small random model in place of the real one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from vattn_sgl.eval import capture, selectors

CONTEXT, LAYERS, QO_HEADS, HEAD_DIM = 400, 2, 6, 32


@dataclass
class Small:
    """A model of two layers, its calibration and one captured text."""

    model: Any
    geometry: capture.Geometry
    calibrator: selectors.Calibrator
    tokens: list[int]
    weights: str

    def captured(self, positions: list[int]) -> capture.Captured:
        return capture.capture(self.model, self.tokens, positions)

    def adapters(self, captured: capture.Captured) -> list[selectors.Adapter]:
        made = selectors.adapters(self.geometry, self.calibrator, self.weights)
        for adapter in made:
            adapter.attach(captured)
        return made


def write_hash_weights(path: Path, layers: int = LAYERS) -> str:
    """Untrained nets of two layers, one for every query head, as HashAttention's authors store them."""
    g = torch.Generator().manual_seed(1)
    sizes = (HEAD_DIM, 48, 64)
    net = {
        f"{side}_{part}": [
            torch.randn(QO_HEADS, *((i, o) if part == "matrix" else (o,)), generator=g) * 0.3
            for i, o in pairwise(sizes)
        ]
        for side in ("query", "key")
        for part in ("matrix", "bias")
    }
    torch.save(dict.fromkeys(range(layers), net), path)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QO_HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    g = capture.geometry(model)
    tokens = torch.randint(0, 97, (2, CONTEXT)).tolist()
    weights = write_hash_weights(tmp_path_factory.mktemp("hash") / "weights.pt")
    return Small(model, g, selectors.Calibrator(model, g, tokens[1]), tokens[0], weights)
