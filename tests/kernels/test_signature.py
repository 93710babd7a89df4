"""Signatures: packing, HashAttention's nets against torch's own layers, the angle that random hyperplanes estimate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vattn_kernels import signature


@pytest.mark.parametrize("bits", [32, 64, 128])
def test_words_keep_every_bit(bits):
    signs = torch.rand(5, 3, bits, generator=torch.Generator().manual_seed(bits)) < 0.5
    words = signature.to_words(signs)
    assert words.dtype == torch.int32
    assert words.shape == (5, 3, bits // 32)
    assert torch.equal(signature.to_bits(words), signs)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_nets_are_linear_layers_with_silu_between(layers):
    g = torch.Generator().manual_seed(layers)
    widths = [*[64, 48, 40][:layers], 32]
    matrices = [torch.randn(2, i, o, generator=g) for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(2, o, generator=g) for o in widths[1:]]
    nets, packed = signature.pack(matrices, biases)
    assert packed.tolist() == widths
    x = torch.randn(7, 64, generator=g)
    for head in range(2):
        parts = []
        for matrix, bias in zip(matrices, biases, strict=True):
            linear = torch.nn.Linear(*matrix.shape[1:])
            linear.weight.data, linear.bias.data = matrix[head].T, bias[head]
            parts += [linear, torch.nn.SiLU()]
        expected = torch.nn.Sequential(*parts[:-1])(x)
        assert torch.allclose(signature.outputs(x, nets[head], widths), expected, atol=1e-4)


def test_random_hyperplanes_estimate_the_cosine():
    """Mean over 200 pairs of 128-bit estimates: standard error below .14 a pair, so .01 for their mean gap."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(200, 64, generator=g)
    k = 0.7 * q + 0.7 * torch.randn(200, 64, generator=g)
    nets, widths = signature.random_nets(0, 64, 128, 1)
    query_bits, key_bits = (signature.outputs(x, nets[0], widths.tolist()) > 0 for x in (q, k))
    raw, unit, base = signature.features(q, query_bits, key_bits[None], k.norm(dim=-1), torch.zeros(64), True, 0.125)
    cosine = torch.nn.functional.cosine_similarity(q, k)
    gap = (raw / unit).diagonal() - cosine
    assert abs(float(gap.mean())) < 0.04
    assert float(gap.std()) < 0.14
    assert torch.equal(base, torch.zeros(200))


def test_agreement_runs_from_one_to_minus_one():
    for angular in (False, True):
        table = signature.agreement(64, angular)
        assert table[0] == 1
        assert math.isclose(float(table[64]), -1)
        assert abs(float(table[32])) < 1e-9
        assert (table.diff() < 0).all()
