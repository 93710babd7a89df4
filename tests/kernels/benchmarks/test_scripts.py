"""What the benchmarks refuse before they start anything, and that the page of results is that of the saved run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import decode_gpu
import pytest

FOLDER = Path(decode_gpu.__file__).parent


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("serve.py", "--context", "999999"), "--context 999999, expected at most"),
        (("serve.py", "--tokens", "3"), "--tokens 3, expected more than"),
        (("report.py", "--json", "no-such.json"), "no-such.json: "),
        (("report.py", "--png", "roofline.txt"), "roofline.txt, expected a file whose name ends in .png"),
        (("report.py", "--png", "no-such/roofline.png"), "expected a file that can be written"),
        (("decode_gpu.py", "--json", "/"), "'/', expected a file that can be written"),
    ],
)
def test_a_script_says_why_it_does_not_start(command, message):
    run = subprocess.run([sys.executable, FOLDER / command[0], *command[1:]], capture_output=True, text=True)
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr


def test_the_page_holds_the_table_of_the_saved_run(tmp_path):
    command = [sys.executable, FOLDER / "report.py", "--png", tmp_path / "roofline.png"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.count("\n") > len(decode_gpu.SHAPES) and table in (FOLDER / "RESULTS.md").read_text()
    assert (tmp_path / "roofline.png").stat().st_size
