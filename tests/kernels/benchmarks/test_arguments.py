"""What the benchmarks refuse before they start anything."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import arguments
import pytest

FOLDER = Path(arguments.__file__).parent


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
    + [(arguments.writable, "no/such/folder/rows.json")],
)
def test_what_is_wrong_is_named_with_what_was_expected(kind, text):
    with pytest.raises(ArgumentTypeError, match=f"^'{text}', expected"):
        kind(text)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("serve.py", "--context", "999999"), "--context 999999, expected at most"),
        (("serve.py", "--tokens", "3"), "--tokens 3, expected more than"),
        (("report.py", "--json", "no-such.json"), "no-such.json: "),
    ],
)
def test_a_script_says_why_it_does_not_start(command, message):
    run = subprocess.run([sys.executable, FOLDER / command[0], *command[1:]], capture_output=True, text=True)
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
