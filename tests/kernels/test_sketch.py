"""How a sketch's bits are given out and where its fields lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattn_kernels import sketch


def solved(bits, head_dim, lanes, seed):
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0.5, -1.0, head_dim) * (1 + torch.rand(head_dim, generator=g))
    k = torch.randn(400, 2, head_dim, generator=g) * spread
    moments = sketch.Moments.zeros(1, 2, head_dim, "cpu")
    moments.add(0, torch.randn(400, 4, head_dim, generator=g), k)
    return sketch.solve(moments, k[None], bits, lanes).fields[0]


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([32, 64, 128]), head_dim=st.sampled_from([16, 64, 96, 128]), lanes=st.booleans(),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_fields_fit_their_words_and_do_not_overlap(bits, head_dim, lanes, seed):
    for fields in solved(bits, head_dim, lanes, seed).tolist():
        taken = set()
        for word, shift, width in fields:
            assert 0 <= word < bits // 32 and 0 <= width <= sketch.MAX_WIDTH and shift + width <= 32
            own = {(word, shift + i) for i in range(width)}
            assert not own & taken
            taken |= own
        assert head_dim < 64 or len(taken) >= bits - 8


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([32, 64, 128]), head_dim=st.sampled_from([16, 64, 96, 128]), seed=st.integers(0, 100))
def test_lanes_are_what_one_shift_and_mask_read(bits, head_dim, seed):
    words = bits // 32
    for fields in solved(bits, head_dim, True, seed).tolist():
        for group in range(len(fields) // 4):
            rows = fields[4 * group : 4 * group + 4]
            widths = {width for _, _, width in rows}
            assert len(widths) == 1
            if group >= sketch.GROUPS_PER_WORD * words:
                assert widths == {0}
            if widths == {0}:
                continue
            assert {word for word, _, _ in rows} == {group % words}
            assert len({shift - 8 * lane for lane, (_, shift, _) in enumerate(rows)}) == 1
            assert rows[0][1] >= 0 and rows[0][1] + rows[0][2] <= 8


@pytest.mark.parametrize(
    ("widths", "is_read"),
    [
        ((5, 2, 1), True),
        ((5, 3, 0), True),
        ((5, 1, 0), True),
        ((5, 1, 1), False),
        ((5, 4, 0), False),
        ((5, 5, 5), False),
    ],
)
def test_groups_that_do_not_fit_their_byte_are_refused(widths, is_read):
    rows, used = [], 0
    for width in widths:
        rows += [[0, 8 * lane + used, width] if width else [0, 0, 0] for lane in range(4)]
        used += width
    fields = torch.tensor(rows, dtype=torch.int32)[None, None]
    if is_read:
        sketch.check_fields(fields, 32, lanes=True)
    else:
        with pytest.raises(ValueError, match="bits in a byte of 8"):
            sketch.check_fields(fields, 32, lanes=True)


@pytest.mark.parametrize("bits", [64, 128])
def test_lanes_code_nearly_as_many_dimensions(bits):
    def kept(lanes):
        return int((solved(bits, 128, lanes, 0)[..., 2] > 0).sum())

    assert kept(True) >= 0.6 * kept(False)
