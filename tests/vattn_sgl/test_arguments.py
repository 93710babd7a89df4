"""Types of arguments: what is taken, and what is named as wrong."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from vattn_sgl import arguments


def test_what_is_given_is_taken(tmp_path):
    assert arguments.positive("12") == 12
    assert arguments.shape("16x32768") == (16, 32768)
    assert arguments.share("0.05") == 0.05 and arguments.share("1") == 1.0
    assert arguments.writable(str(tmp_path / "rows.json")) == tmp_path / "rows.json"


@pytest.mark.parametrize(
    ("kind", "text"),
    [(arguments.positive, text) for text in ("0", "-1", "x", "1.5", "")]
    + [(arguments.shape, text) for text in ("16", "0x5", "axb", "1x2x3", "x")]
    + [(arguments.share, text) for text in ("0", "7", "-0.1", "nan", "a")]
    + [(arguments.writable, text) for text in ("no/such/folder/rows.json", ".", "")],
)
def test_what_is_wrong_is_named_with_what_was_expected(kind, text):
    with pytest.raises(ArgumentTypeError, match=f"^'{text}', expected"):
        kind(text)
