"""A small random model in place of the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vattn_sgl.eval import capture, selectors

CONTEXT = 400


@dataclass
class Small:
    """A model of two layers, its calibration and one captured text."""

    model: Any
    geometry: capture.Geometry
    calibrator: selectors.Calibrator
    tokens: list[int]

    def captured(self, positions: list[int]) -> capture.Captured:
        return capture.capture(self.model, self.tokens, positions)

    def adapters(self, captured: capture.Captured) -> list[selectors.Adapter]:
        made = selectors.adapters(self.geometry, self.calibrator)
        for adapter in made:
            adapter.attach(captured)
        return made


@pytest.fixture(scope="module")
def small() -> Small:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    g = capture.geometry(model)
    tokens = torch.randint(0, 97, (2, CONTEXT)).tolist()
    return Small(model, g, selectors.Calibrator(model, g, tokens[1]), tokens[0])
