"""Steps served by kernels' PTX, emulated, against interpreted ones: the Gluon kernels', and those of ``uniform``.

Run by ``test_interpreter.py`` in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from interpreted import SINK, WINDOW, Step
from ptx import Kernel

from vattn_kernels import triton as gpu
from vattn_kernels.triton import layout

SCRIPT = Path(__file__).with_name("kernel_ptx.py")
GLUON = ("select_lists_fwd_kernel", "attend_lists_fwd_kernel")
UNIFORM = ("rank_fwd_kernel", "top_k_fwd_kernel", "list_fwd_kernel", "budget_fwd_kernel")
TENSORS = ("p_q", "p_k", "p_v", "p_out")
# A context whose sampled range is one whole block.
BORDER = SINK + WINDOW + layout.BLOCK


@functools.cache
def compiled(name, constants, multiples, warps):
    """PTX of one kernel."""
    run = subprocess.run(
        [sys.executable, SCRIPT],
        input=json.dumps([name, dict(constants), multiples, warps]),
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


class Emulated:
    """Stands for a kernel, and runs its PTX; ``constants`` differ from those it is launched with."""

    def __init__(self, kernel, **constants):
        self.kernel, self.constants, self.launches = kernel, constants, 0

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *arguments, num_warps, maxnreg=None, launch_pdl=False, **constants):
        constants |= self.constants
        given = dict(zip([n for n in self.kernel.arg_names if n not in constants], arguments, strict=True))
        # The interpreter multiplies no bfloat16; what it was given are bfloat16s in float32.
        constants |= {n: None for n, v in given.items() if v is None}
        given = {n: v for n, v in given.items() if v is not None}
        narrow = {n: given[n].bfloat16() for n in TENSORS if n in given}
        wide, given = given, given | narrow
        multiples = [n for n, v in given.items() if (v.data_ptr() if torch.is_tensor(v) else v) % 16 == 0]
        name = self.kernel.fn.__name__
        text = compiled(name, tuple(sorted(constants.items())), tuple(multiples), num_warps)
        Kernel(text).run(grid[0], list(given.values()))
        if "p_out" in narrow:
            wide["p_out"].copy_(narrow["p_out"])
        self.launches += 1


@pytest.fixture
def emulated(monkeypatch):
    """Lets compiled kernels serve from here on, by default Gluon's with the signals that they give and take."""
    monkeypatch.setattr(layout.LAUNCH, "programs", 8)
    monkeypatch.setattr(layout.LAUNCH, "tail_items", 6)

    def begin(names=GLUON):
        given = {}
        if names == GLUON:
            monkeypatch.setattr(layout, "gluon_serves", lambda device: True)
            monkeypatch.setattr(layout, "one_warp_attends", lambda *_: True)
            given = {"DEPENDENT": True}
        kernels = [Emulated(getattr(gpu, name), **given) for name in names]
        for name, kernel in zip(names, kernels, strict=True):
            monkeypatch.setattr(gpu, name, kernel)
        return kernels

    return begin


def case_of(heads, head_dim, context, **options):
    """A step that has learnt a scale, of numbers that bfloat16 holds."""
    sizes = {"num_qo_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim}
    case = Step(batch=2, context=context, epsilon=0.9, **sizes, **options)
    for name in ("q", "k_cache", "v_cache"):
        setattr(case, name, getattr(case, name).bfloat16().float())
    case.learnt(3.0)
    return case


def lists_of(case):
    """What the last call selected, by row."""
    return [case.lists(request, head) for request in range(case.batch) for head in range(case.num_kv_heads)]


def counts_of(case):
    """How many tokens the last call selected, by row and list."""
    rows = case.batch * case.num_kv_heads
    return case.workspace().counts[:rows, : layout.LISTS.value * layout.splits_of(rows)].clone()


def by_slot(entries, counts):
    """Entries of each row in the order of the lists, and in each list in that of the slots."""
    ordered = []
    for (slots, pi), own in zip(entries, counts, strict=True):
        which = torch.arange(own.numel()).repeat_interleave(own)
        order = ((which << 32) + slots).argsort()
        ordered.append((slots[order], pi[order]))
    return ordered


@pytest.mark.parametrize(
    ("heads", "head_dim", "context", "bits", "target"),
    [
        # Lists of no token, of fewer than a tile holds, and of several tiles.
        ((4, 2), 64, 200, 64, "output"), ((4, 2), 64, 1111, 32, "output"), ((4, 1), 128, 2600, 64, "output"),
        ((3, 1), 64, 1111, 128, "output"), ((1, 1), 128, 1000, 64, "output"), ((2, 2), 64, 2047, 128, "output"),
        ((3, 1), 128, 600, 32, "output"), ((4, 1), 64, 7000, 64, "output"), ((3, 1), 64, 5000, 128, "output"),
        # The range ends where a block does, and a token before that.
        ((4, 2), 64, BORDER, 64, "output"), ((4, 2), 64, BORDER - 1, 64, "output"),
        ((2, 1), 64, BORDER + 15 * layout.BLOCK, 64, "output"),
        ((4, 2), 64, 700, 64, "denominator"), ((4, 2), 64, 700, 64, "numerator"), ((4, 2), 64, 700, 64, "sdpa"),
    ],
)  # fmt: skip
def test_emulated_kernels_do_what_the_interpreted_ones_do(emulated, heads, head_dim, context, bits, target):
    case = case_of(heads, head_dim, context, bits=bits, settings={"target": target})
    before = case.state.clone()
    truth, true_stats, _ = case.run()
    counts, true_state = counts_of(case), case.state.clone()
    true_lists = by_slot(lists_of(case), counts)
    case.state.copy_(before)
    case.workspace().listed.fill_(1)
    kernels = emulated()
    out, stats, _ = case.run()
    assert [kernel.launches for kernel in kernels] == [1, 1]
    work, rows = case.workspace(), 2 * heads[1]
    splits = layout.splits_of(rows)
    assert (work.listed[:rows, :splits] == 1).all() and not work.listed[:rows, splits:].any()
    assert (work.attended[:rows] == splits + 1).all()
    assert torch.equal(counts_of(case), counts)
    for (slots, pi), (true_slots, true_pi) in zip(by_slot(lists_of(case), counts), true_lists, strict=True):
        assert torch.equal(slots, true_slots)
        torch.testing.assert_close(pi, true_pi, rtol=1e-5, atol=0)
    # The emulated kernel rounds weights to bfloat16.
    torch.testing.assert_close(out, truth, rtol=0.02, atol=0.02)
    torch.testing.assert_close(stats, true_stats, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(case.state, true_state, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("heads", "head_dim", "context", "settings"),
    [
        ((4, 2), 64, 700, {}), ((3, 1), 64, 1111, {"target": "sdpa"}), ((1, 1), 128, 601, {"target": "denominator"}),
        ((2, 1), 64, 500, {"top_k_count": 0}),
        ((2, 2), 64, 900, {"cap": 0.1, "top_k_share": 0.2, "target": "numerator"}),
    ],
)  # fmt: skip
def test_emulated_steps_of_uniform_are_the_interpreted_ones(emulated, heads, head_dim, context, settings):
    case = case_of(heads, head_dim, context, settings={"sampler": "uniform", "pilot": 0.1} | settings)
    case.epsilon = 0.3
    # One request's keys all tie.
    case.k_cache[case.kv_indices[1].long()] = 0.5
    case.state.zero_()
    case.run()
    before = case.state.clone()
    truth, true_stats, true_counters = case.run()
    true_lists = lists_of(case)
    assert true_stats[..., 0].lt(1).any()
    case.state.copy_(before)
    kernels = emulated(UNIFORM)
    out, stats, counters = case.run()
    assert [kernel.launches for kernel in kernels] == [1, 1, 2, 2]
    for (slots, pi), (true_slots, true_pi) in zip(lists_of(case), true_lists, strict=True):
        assert torch.equal(slots, true_slots)
        torch.testing.assert_close(pi, true_pi, rtol=1e-5, atol=0)
    # The emulated kernel rounds what it returns to bfloat16.
    torch.testing.assert_close(out, truth, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(stats, true_stats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(counters, true_counters, rtol=1e-6, atol=1e-6)


def test_rows_that_are_not_sampled_end_at_once_and_signal(emulated):
    case = case_of((4, 2), 64, 600)
    case.state[case.state_rows[1], :, layout.STATE_CONTEXT.value] = 0
    work = case.workspace()
    emulated()
    work.entries.fill_(-1)
    out, stats, _ = case.run()
    assert torch.isfinite(out).all() and case.errors(out)[1].max() < 1e-3
    assert stats[1, :, 0].eq(1).all() and stats[0, :, 0].lt(1).all()
    assert (work.entries[2 * layout.capacity(4, 600) : 4 * layout.capacity(4, 600)] == -1).all()
    assert (work.attended[:4] == layout.splits_of(4) + 1).all()


def test_a_padded_row_is_its_one_token(emulated):
    case = case_of((4, 2), 64, 600)
    case.seq_lens[1] = 1
    used = case.workspace().used.fill_(-1)
    kernels = emulated()
    out, stats, _ = case.run()
    assert used == -1
    assert [kernel.launches for kernel in kernels] == [1, 1]
    first = case.v_cache[case.kv_indices[1, 0].long()].repeat_interleave(2, 0)
    assert torch.equal(out[1], first)
    assert stats[1, :, 0].eq(1).all() and stats[0, :, 0].lt(1).all()


@pytest.mark.parametrize(
    ("kernel", "right", "wrong", "named"),
    [
        ("attend_lists_fwd_kernel", r"wait_group\s+0", "wait_group 1", "copies that nothing"),
        ("select_lists_fwd_kernel", r"setp\.gt\.f32", "setp.eq.f32", "no error"),
        ("attend_lists_fwd_kernel", r"(st\.global\.v4\.b32 .*) \+ 0 ]", r"\1 + 4000000000 ]", "an access of"),
    ],
    ids=["a copy not waited for", "no tokens", "an address of nothing"],
)
def test_a_broken_kernel_is_found(emulated, monkeypatch, kernel, right, wrong, named):
    """That the tests above can fail."""
    case = case_of((4, 2), 64, 600)
    before = case.state.clone()
    truth, _, _ = case.run()
    case.state.copy_(before)
    emulated()
    changes = []

    def broken(name, *rest, intact=compiled):
        if name != kernel:
            return intact(name, *rest)
        text, count = re.subn(right, wrong, intact(name, *rest))
        changes.append(count)
        return text

    monkeypatch.setitem(globals(), "compiled", broken)
    try:
        found = not torch.allclose(case.run()[0], truth, rtol=0.02, atol=0.02)
    except (AssertionError, IndexError) as error:
        found = str(error).startswith(named)
    assert changes[0] > 0
    assert found
