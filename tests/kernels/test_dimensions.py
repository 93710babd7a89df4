"""Effective dimensions of values: a participation ratio, the least of the KV heads, within what ``f8`` presumes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vattn_kernels import dimensions


def values(*varying, num_tokens=1000, head_dim=16):
    """Values whose heads vary in so many dimensions each, far from 0."""
    g = torch.Generator().manual_seed(sum(varying))
    heads = []
    for dims in varying:
        directions = torch.linalg.qr(torch.randn(head_dim, dims, generator=g)).Q
        heads.append(3 + torch.randn(num_tokens, dims, generator=g) @ directions.T)
    return torch.stack(heads, 1)


@pytest.mark.parametrize("dims", [1, 2, 3, 5, 7])
def test_isotropic_values_have_as_many_as_they_vary_in(dims):
    assert dims - 0.25 <= dimensions.effective(values(dims)) <= dims


def test_the_least_of_the_heads_counts_and_no_more_than_f8_presumes():
    assert dimensions.effective(values(12, 3, 9)) == dimensions.effective(values(3))
    assert dimensions.effective(values(12, 15)) == dimensions.MOST


def test_values_that_do_not_vary_have_the_least():
    assert dimensions.effective(torch.full((63, 2, 16), 5.0)) == dimensions.LEAST
    assert dimensions.effective(torch.randn(1, 2, 16)) == dimensions.LEAST


@given(st.integers(1, 111), st.integers(1, 3), st.integers(1, 64), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape_and_dtype_gives_a_quarter_within_the_limits(num_tokens, heads, head_dim, dtype):
    found = dimensions.effective(torch.randn(num_tokens, heads, head_dim, dtype=dtype))
    assert dimensions.LEAST <= found <= dimensions.MOST
    assert found * 4 == int(found * 4)
