"""Texts that calibrations and evaluations read."""

from __future__ import annotations

import pytest

from vattn_sgl import texts


@pytest.mark.parametrize(
    "name", [texts.CALIBRATION, texts.CALIBRATION_MORE, texts.DEMONSTRATION, texts.EVALUATION, texts.EVALUATION_MANUAL]
)
def test_a_shipped_text_is_read(name):
    assert len(texts.load(name)) > 10_000


def test_code_is_that_of_the_running_python():
    for name, word in zip(texts.EVALUATION_CODE, ("class ArgumentParser", "class TarFile"), strict=True):
        assert word in texts.load(name)
