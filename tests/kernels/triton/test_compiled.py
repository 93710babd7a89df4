"""Every GPU kernel compiled for sm_80 and sm_90, and the registers, spills and shared memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vattn_kernels.triton import layout

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = 12
# Those that a selector other than ``sketch`` has to itself.
SELECTED = {"prepare_fwd_kernel", "select_fwd_kernel", "rank_fwd_kernel", "finish_fwd_kernel"}
# Those compiled for the most splits too, and the registers they then take.
SPLIT = {"combine_fwd_kernel": 208, "budget_fwd_kernel": 248}
SIGNED = {"sign_queries_fwd_kernel", "sign_keys_fwd_kernel"}
# The shape that the speed claims are about: nothing spills there, and as many programs fit a multiprocessor as planned.
MAIN = {"dtype": "bf16", "cache": "bf16", "head_dim": 128, "group": 4, "words": 2}
MOST_REGISTERS = {
    "prepare_fwd_kernel": 200, "select_fwd_kernel": 255, "select_lists_fwd_kernel": 64, "attend_fwd_kernel": 168,
    "attend_lists_fwd_kernel": 168, "combine_fwd_kernel": 160,
    "finish_fwd_kernel": 255, "choose_fwd_kernel": 64, "audit_fwd_kernel": 168,
    "update_fwd_kernel": 255, "mark_slots_fwd_kernel": 64, "bound_pages_fwd_kernel": 64,
    "sign_queries_fwd_kernel": 255, "sign_keys_fwd_kernel": 255, "rank_fwd_kernel": 255, "top_k_fwd_kernel": 96,
    "list_fwd_kernel": 96, "budget_fwd_kernel": 255,
}  # fmt: skip
# Those that take more elsewhere, by kernel, head_dim and group.
MOST_REGISTERS_ELSEWHERE = {
    ("select_lists_fwd_kernel", 96, 1): 96, ("attend_fwd_kernel", 128, 16): 224,
}  # fmt: skip
# Bytes a thread that wide tiles may spill, by kernel, selector, head_dim and group; elsewhere a few.
FEW_BYTES = 8
MOST_SPILLED = {
    ("update_fwd_kernel", "sketch", 96, 1): 128,
    ("update_fwd_kernel", "sketch", 128, 8): 96, ("finish_fwd_kernel", "sketch", 96, 1): 72,
    ("finish_fwd_kernel", "sketch", 128, 8): 32,
    ("finish_fwd_kernel", "sketch", 128, 16): 48, ("finish_fwd_kernel", "sketch", 128, 4): 48,
    ("finish_fwd_kernel", "oracle", 128, 4): 160,
}  # fmt: skip
# At the widest shape that is compiled a kernel may take all registers, and spill so many bytes a thread.
WIDEST, ALL_REGISTERS = (256, 16), 255
MOST_SPILLED_BY_THE_WIDEST = {
    "prepare_fwd_kernel": 208, "select_fwd_kernel": 256, "attend_fwd_kernel": 512, "combine_fwd_kernel": 320,
    "finish_fwd_kernel": 640, "update_fwd_kernel": 960, "budget_fwd_kernel": 384, "sign_keys_fwd_kernel": 48,
}  # fmt: skip
# Of a multiprocessor: registers, and shared memory of the one that has least, sm_86; CUDA keeps some for each program.
REGISTERS, SMALLEST, KEPT = 65536, 100 << 10, 1 << 10


@pytest.fixture(scope="module")
def rows():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(("arch", "count", "caches"), [(80, 8, {"fp8e5"}), (90, 11, {"fp8e5", "fp8e4nv"})])
def test_every_kernel_compiles(rows, arch, count, caches):
    built = [r for r in rows if r["arch"] == arch and r["selector"] == "sketch" and r["splits"] != layout.MOST_SPLITS]
    models = {(r["dtype"], r["cache"], r["head_dim"], r["group"], r["words"]) for r in built}
    assert len(built) == KERNELS * len(models) and len(models) == count
    assert {r["cache"] for r in built} == caches | {"bf16", "fp16"}
    others = [r for r in rows if r["arch"] == arch and r["selector"] != "sketch"]
    assert {r["kernel"] for r in built + others} == set(MOST_REGISTERS)
    for row in built + others:
        assert row["shared"] + KEPT <= SMALLEST, row


def test_programs_that_wait_for_each_other_run_at_once(rows):
    """Two a multiprocessor where `layout.finish_programs` says so, else one; CUDA would refuse to launch more."""
    for row in (r for r in rows if r["kernel"] == "finish_fwd_kernel"):
        assert 2 * (row["shared"] + KEPT) <= layout.finish_shared(row["head_dim"]), row
        registers = -(-row["registers"] // 8) * 8
        assert 2 * registers * row["threads"] <= REGISTERS, row


def test_kernels_of_the_main_shape_fit(rows):
    main = [r for r in rows if r["arch"] == 90 and MAIN.items() <= r.items()]
    assert len([r for r in main if r["selector"] == "sketch"]) == KERNELS + len(SPLIT)
    assert {r["kernel"] for r in main if r["splits"] == layout.MOST_SPLITS} == set(SPLIT)
    for selector, own in {
        "oracle": SELECTED,
        "quest": SELECTED | {"mark_slots_fwd_kernel", "bound_pages_fwd_kernel"},
        "sign": SELECTED | SIGNED,
        "hash": SELECTED | SIGNED,
    }.items():
        assert sorted(r["kernel"] for r in main if r["selector"] == selector) == sorted(own)
    assert all(row["spills"] <= FEW_BYTES for row in main)


def test_no_kernel_takes_more_registers_or_spills_more_than_it_may(rows):
    for row in rows:
        kernel, where = row["kernel"], (row["head_dim"], row["group"])
        if where == WIDEST:
            registers, spilled = ALL_REGISTERS, MOST_SPILLED_BY_THE_WIDEST.get(kernel, FEW_BYTES)
        else:
            registers = MOST_REGISTERS_ELSEWHERE.get((kernel, *where), MOST_REGISTERS[kernel])
            if row["splits"] == layout.MOST_SPLITS:
                registers = SPLIT[kernel]
            spilled = MOST_SPILLED.get((kernel, row["selector"], *where), FEW_BYTES)
        assert row["registers"] <= registers, row
        assert row["spills"] <= spilled, row


def test_kernels_of_an_fp8_cache_do_not_spill_but_for_exact_attention(rows):
    fp8 = [r for r in rows if (MAIN | {"cache": r["cache"]}).items() <= r.items() and r["cache"].startswith("fp8")]
    assert len(fp8) == 3 * KERNELS
    assert all(r["spills"] <= FEW_BYTES for r in fp8 if r["kernel"] != "finish_fwd_kernel")
