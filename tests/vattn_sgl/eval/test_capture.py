"""What is captured is what the model's own attention sees."""

from __future__ import annotations

import pytest
import torch

from vattn_sgl import texts
from vattn_sgl.eval import capture, methods


@torch.inference_mode()
def test_capture_equals_the_models_own_attention(small):
    positions = [100, 399]
    captured = small.captured(positions)
    own = small.model(torch.tensor(small.tokens)[None], use_cache=True)
    torch.testing.assert_close(captured.log_probs, torch.log_softmax(own.logits[0, positions], -1), atol=1e-4, rtol=0)
    for layer, cached in enumerate(own.past_key_values.layers):
        keys, values = cached.keys[0].transpose(0, 1), cached.values[0].transpose(0, 1)
        torch.testing.assert_close(captured.k[layer, : len(small.tokens)], keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(captured.v[layer, : len(small.tokens)], values, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_exact_attention_of_captured_queries_equals_the_models_output(small):
    positions, outputs = [63, 257, 399], []

    def attend(layer, q, k, v):
        outputs.append(capture.dense(q, k, v))
        return outputs[-1]

    with capture.attention(small.model, attend):
        capture.forward(small.model, torch.tensor(small.tokens))
    captured = small.captured(positions)
    for layer, output in enumerate(outputs):
        rows = methods.causal_rows(captured, layer, torch.arange(3))
        exact = methods.exact(captured, small.geometry, rows)
        torch.testing.assert_close(exact.float(), output[positions], atol=1e-4, rtol=1e-4)


def test_the_models_attention_is_put_back(small):
    before = small.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), capture.attention(small.model, _fail):
        capture.forward(small.model, torch.tensor([1, 2]))
    assert small.model.config._attn_implementation == before


def _fail(layer, q, k, v):
    raise RuntimeError("on purpose")


def test_continuations_are_the_models_own_and_captured(small):
    prompt = small.tokens[:50]
    own = small.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    continued = capture.continue_densely(small.model, prompt, 6)
    assert continued.tokens.tolist() == own[0, :-1].tolist()
    again = capture.capture(small.model, continued.tokens.tolist(), range(50, 55))
    for name in ("k", "v", "q", "log_probs"):
        torch.testing.assert_close(getattr(continued, name), getattr(again, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(continued.positions, again.positions)


@pytest.mark.parametrize("positions", [[], [-1], [400]])
def test_positions_outside_the_text_are_refused(small, positions):
    with pytest.raises(ValueError, match="positions"):
        small.captured(positions)


def test_shipped_texts_differ_and_are_long():
    names = (texts.CALIBRATION, texts.CALIBRATION_MORE, texts.DEMONSTRATION, texts.EVALUATION, texts.EVALUATION_MANUAL)
    loaded = {name: texts.load(name) for name in names}
    assert len(set(loaded.values())) == len(names)
    assert len(loaded[texts.EVALUATION]) > 140_000
