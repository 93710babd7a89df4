"""What the benchmarks refuse before they start anything, and that the page of results is that of the saved run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import decode_gpu
import pytest
import torch
from decode_case import relative_error

from vattn_kernels import ops

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


class Sampled:
    """Stands for a `decode_gpu.Case`: outputs that err by a little less than they state."""

    batch, context, layers = 2, 4096, 4
    half_width = 0.02
    # Of a draw that knows no scores.
    unscored = 0.5

    def __init__(self):
        shape = self.batch, decode_gpu.QO_HEADS, decode_gpu.HEAD_DIM
        self.exact = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        # What an earlier step stated must not count.
        self.out, self.stats = torch.empty(shape), torch.full((*shape[:2], len(ops.STATS)), self.half_width)

    def errors(self, layer, request, out):
        error = relative_error(out[request], self.exact[request])
        return error, torch.full_like(error, self.unscored)

    def decode(self, spoil=None, half_width=half_width):
        if half_width is not None:
            self.stats[..., ops.STATS.index("half_width")] = half_width
        out = self.exact * (1 + 0.9 * self.half_width)
        return out if spoil is None else spoil(out)

    def check(self, is_certified=False, **spoilt):
        return decode_gpu.checked(self, lambda layer: self.decode(**spoilt), "ours", True, is_certified)


@pytest.fixture(
    params=[
        (1, 354, (8, [0])),
        (1, 3, (3, [0])),
        (2, 4, (4, [0, 1])),
        (16, 354, (4, [0, 15])),
        (4, 3, (3, [0, 2, 3])),
        (64, 1, (1, list(range(0, 64, 9)))),
        (4, 1, (1, [0, 1, 2, 3])),
    ],
    ids=lambda given: f"{given[0]}-requests-{given[1]}-layers",
)
def checked_in_last(request, monkeypatch):
    """Checks a case with one request spoilt in the last layer that is checked; the last request alone states .1."""
    batch, layers, found = request.param
    monkeypatch.setattr(Sampled, "batch", batch)
    monkeypatch.setattr(Sampled, "layers", layers)
    case = Sampled()
    assert decode_gpu.to_check(case) == found

    def check(spoil, at=-1):
        def run(layer):
            out = case.decode()
            case.stats[-1, :, ops.STATS.index("half_width")] = 0.1
            out[-1] *= 1.06
            if layer == found[0] - 1:
                out[at] = spoil(out[at][None])[0]
            return out

        return decode_gpu.checked(case, run, "ours", True)["beyond"] * 32 * found[0] * len(found[1])

    return check


def test_a_head_that_misses_a_needle_is_told_and_refuses_nothing(checked_in_last):
    assert checked_in_last(lambda out: out) == 0
    assert checked_in_last(heads([7], 1.3)) == 1


def test_one_request_of_one_layer_that_is_wrong_is_refused(checked_in_last):
    with pytest.raises(decode_gpu.WrongOutputError, match="of heads beyond"):
        checked_in_last(lambda out: 1.1 * out)


def test_no_request_may_be_nan(checked_in_last):
    """Those that are not checked by their errors either."""
    with pytest.raises(decode_gpu.WrongOutputError, match="errors of up to"):
        checked_in_last(heads([7], float("nan")), at=min(1, Sampled.batch - 1))


def heads(which, factor):
    """Multiplies the outputs of some heads."""
    return lambda out: out.index_copy(1, torch.tensor(which), factor * out[:, which])


def test_a_sample_that_keeps_what_it_states_is_timed():
    found = Sampled().check()
    assert found == pytest.approx({"error": 0.018, "half_width": 0.02, "beyond": 0.0}, abs=1e-6)
    assert Sampled().check(spoil=heads([5, 9], 1.03))["beyond"] == 2 / 32
    # Where epsilon is not to hold.
    assert Sampled().check(half_width=1.01 * decode_gpu.EPSILON)
    assert Sampled().check(is_certified=True, half_width=decode_gpu.EPSILON)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"spoil": lambda out: 0 * out, "half_width": 1e3},
        {"spoil": lambda out: -out, "half_width": 1e3},
        {"half_width": None},
        {"half_width": float("inf")},
        {"spoil": lambda out: 1.03 * out},
        {"spoil": heads([0, 1, 2, 3], 2.0)},
        {"spoil": heads(list(range(0, 32, 4)), 1.03)},
        {"spoil": heads([7], float("nan"))},
        {"spoil": lambda out: 0.5 * out, "half_width": 0.6},
        {"spoil": lambda out: 1.9 * out, "half_width": 0.95},
        {"is_certified": True, "half_width": 1.01 * decode_gpu.EPSILON},
    ],
    ids=[
        *("zeros", "negated", "unstated", "unbounded", "scaled", "a-kv-head", "a-head-of-each-group", "nan"),
        *("half-and-so-stated", "twice-and-so-stated", "above-epsilon"),
    ],
)
def test_a_sample_that_does_not_is_refused(spoilt):
    with pytest.raises(decode_gpu.WrongOutputError, match="ours at 2x4096"):
        Sampled().check(**spoilt)
