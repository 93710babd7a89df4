"""Moments moved to other positions against moments of rows that stood there."""

from __future__ import annotations

import pytest
import torch

from vattn_kernels.rope import Rope, is_same
from vattn_kernels.sketch import Moments

HEAD_DIM, POSITIONS = 16, 512
LAYOUTS = pytest.mark.parametrize(("rotary_dim", "is_neox"), [(16, True), (16, False), (8, True), (8, False)])


def cache(rotary_dim, scale=1.0):
    """SGLang's cos and sin of every position."""
    frequencies = 100.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * frequencies
    return scale * torch.cat([angles.cos(), angles.sin()], -1)


def rows(num_tokens, heads, seed):
    """Correlated rows with a mean, ``[num_tokens, heads, HEAD_DIM]``."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEAD_DIM, HEAD_DIM, generator=g)
    return torch.randn(num_tokens, heads, HEAD_DIM, generator=g) @ mix + torch.randn(HEAD_DIM, generator=g)


@LAYOUTS
def test_rotation_is_sglangs(rotary_dim, is_neox):
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    x, positions = rows(40, 3, 0), torch.arange(40) * 7
    cos, sin = cache(rotary_dim).float()[positions].chunk(2, -1)
    expected = torch.cat([apply_rotary_emb(x[..., :rotary_dim], cos, sin, is_neox), x[..., rotary_dim:]], -1)
    assert torch.allclose(
        Rope.from_cache(cache(rotary_dim), HEAD_DIM, is_neox).rotate(x, positions), expected, atol=1e-5
    )


@LAYOUTS
def test_unrotate_undoes_rotate_also_when_the_rotation_scales(rotary_dim, is_neox):
    rope = Rope.from_cache(cache(rotary_dim, scale=1.3), HEAD_DIM, is_neox)
    x, positions = rows(40, 3, 0), torch.arange(40) * 7
    assert torch.allclose(rope.unrotate(rope.rotate(x, positions), positions), x, atol=1e-4)
    assert not torch.allclose(rope.rotate(x, positions), x, atol=1e-1)


@LAYOUTS
@pytest.mark.parametrize("span", [1, 63, POSITIONS])
def test_spread_moments_are_those_of_rows_at_every_position(rotary_dim, is_neox, span):
    rope = Rope.from_cache(cache(rotary_dim), HEAD_DIM, is_neox)
    q, k = rows(30, 2, 1), rows(30, 1, 2)
    unrotated, at_positions = (Moments.zeros(1, 1, HEAD_DIM, "cpu") for _ in range(2))
    unrotated.add(0, q, k)
    for m in range(span):
        here = torch.full((30,), m)
        at_positions.add(0, rope.rotate(q, here), rope.rotate(k, here))
    spread = unrotated.at_positions(rope, span)
    for name in ("qq", "kk", "k"):
        expected = getattr(at_positions, name) / span
        assert torch.allclose(getattr(spread, name).float(), expected, rtol=1e-4, atol=1e-2), name
    assert torch.equal(spread.k_count, unrotated.k_count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_cache_is_the_same_rotation(dtype):
    exact, cast = (Rope.from_cache(c, HEAD_DIM, True).sample() for c in (cache(16, 1.3), cache(16, 1.3).to(dtype)))
    assert is_same(exact, cast)


@pytest.mark.parametrize("other", [cache(16, 1.1), cache(8), cache(16)[:200], cache(16)[::2], cache(16).roll(1, 0)])
def test_other_rotations_are_told_apart(other):
    assert not is_same(
        Rope.from_cache(cache(16), HEAD_DIM, True).sample(), Rope.from_cache(other, HEAD_DIM, True).sample()
    )


def test_odd_dimensions_are_refused():
    with pytest.raises(ValueError, match="rotary_dim 18 and head_dim 16"):
        Rope.from_cache(cache(18), HEAD_DIM, True)
