"""Every GPU kernel compiled for sm_80 and sm_90, and the registers, spills and shared memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from vattn_kernels.triton import layout

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = 12
# Those that a selector other than ``sketch`` has to itself.
SELECTED = {
    "prepare_fwd_kernel", "select_fwd_kernel", "rank_fwd_kernel", "attend_lists_fwd_kernel", "finish_fwd_kernel",
}  # fmt: skip
SIGNED = {"sign_queries_fwd_kernel", "sign_keys_fwd_kernel"}
# The shape that the speed claims are about: nothing spills there.
MAIN = {"dtype": "bf16", "cache": "bf16", "head_dim": 128, "group": 4, "words": 2}
# Registers a thread at most, eight more than measured in whole blocks of eight, and KiB of shared memory as measured.
# None: some shape takes all registers, so that its spills are what is bounded.
MOST = {
    "prepare_fwd_kernel": (176, 32), "select_fwd_kernel": (None, 10), "select_lists_fwd_kernel": (104, 0),
    "attend_fwd_kernel": (232, 22), "attend_lists_fwd_kernel": (168, 17), "combine_fwd_kernel": (136, 2),
    "finish_fwd_kernel": (None, 81), "choose_fwd_kernel": (24, 0), "audit_fwd_kernel": (88, 2),
    "update_fwd_kernel": (None, 33), "mark_slots_fwd_kernel": (40, 1), "bound_pages_fwd_kernel": (40, 2),
    "sign_queries_fwd_kernel": (176, 32), "sign_keys_fwd_kernel": (176, 32), "rank_fwd_kernel": (248, 10),
    "top_k_fwd_kernel": (72, 1), "list_fwd_kernel": (64, 1), "budget_fwd_kernel": (136, 2),
}  # fmt: skip
# Registers of those compiled for the most splits too.
SPLIT = {"combine_fwd_kernel": 208, "budget_fwd_kernel": 248}
# Registers of those that survey by a signature for each of sixteen heads.
SURVEYED = {("attend_fwd_kernel", "hash"): 255}
# Kernels that a setting changes at the main shape: how many, and the registers of those that leave rounds out.
VARIANTS = {"denominator": 4, "sdpa": 3, "capped": 1, "uniform": 3, "after the pilot": 1, "audit": 1}
FEWER_ROUNDS = {("finish_fwd_kernel", "uniform"): 248, ("finish_fwd_kernel", "audit"): 176}
# Bytes a thread that wide tiles may spill, by kernel, selector, head_dim and group; elsewhere a few.
FEW_BYTES = 8
MOST_SPILLED = {
    ("finish_fwd_kernel", "sketch", 96, 1): 64, ("finish_fwd_kernel", "sketch", 128, 16): 48,
    ("finish_fwd_kernel", "sketch", 128, 4): 48, ("finish_fwd_kernel", "oracle", 128, 4): 136,
}  # fmt: skip
# At the widest shape these may take all registers, spill so many bytes a thread, and share so many KiB.
WIDEST = (256, 16)
MOST_OF_THE_WIDEST = {
    "prepare_fwd_kernel": (208, 64), "select_fwd_kernel": (200, 10), "attend_fwd_kernel": (512, 52),
    "combine_fwd_kernel": (320, 2), "finish_fwd_kernel": (584, 85), "update_fwd_kernel": (960, 65),
    "budget_fwd_kernel": (368, 2), "bound_pages_fwd_kernel": (8, 4), "sign_queries_fwd_kernel": (8, 64),
    "sign_keys_fwd_kernel": (48, 64), "rank_fwd_kernel": (8, 10),
}  # fmt: skip
# Programs a multiprocessor that limits on registers are for, see `layout.select_registers` and `attend_registers`.
PROGRAMS = {"select_lists_fwd_kernel": 8, "attend_fwd_kernel": 3}
# Of a multiprocessor: registers, and shared memory of the one that has least, sm_86; CUDA keeps some for each program.
REGISTERS, SMALLEST, KEPT = 65536, 100 << 10, 1 << 10


@pytest.fixture(scope="module")
def rows():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(("arch", "count", "caches"), [(80, 8, {"fp8e5"}), (90, 11, {"fp8e5", "fp8e4nv"})])
def test_every_kernel_compiles(rows, arch, count, caches):
    usual = [r for r in rows if r["arch"] == arch and r["variant"] is None]
    built = [r for r in usual if r["selector"] == "sketch" and r["splits"] != layout.MOST_SPLITS]
    models = {(r["dtype"], r["cache"], r["head_dim"], r["group"], r["words"]) for r in built}
    assert len(built) == KERNELS * len(models) and len(models) == count
    assert {r["cache"] for r in built} == caches | {"bf16", "fp16"}
    assert {r["kernel"] for r in usual} == set(MOST)


def test_programs_that_wait_for_each_other_run_at_once(rows):
    """Two a multiprocessor where `layout.finish_programs` says so, else one; CUDA would refuse to launch more."""
    for row in (r for r in rows if r["kernel"] == "finish_fwd_kernel"):
        assert 2 * (row["shared"] + KEPT) <= layout.finish_shared(row["head_dim"]), row
        assert row["shared"] + KEPT <= SMALLEST, row
        # Of so many threads, two programs fit the registers whatever a thread takes.
        assert row["threads"] == 128, row


def test_a_limit_on_registers_lets_as_many_programs_run_as_planned(rows):
    limited = [r for r in rows if r["limit"]]
    assert {r["kernel"] for r in limited} == set(PROGRAMS)
    for row in limited:
        programs = PROGRAMS[row["kernel"]]
        assert programs * row["limit"] * row["threads"] <= REGISTERS, row
        assert programs * (row["shared"] + KEPT) <= SMALLEST, row


def test_kernels_of_the_main_shape_fit(rows):
    main = [r for r in rows if r["arch"] == 90 and MAIN.items() <= r.items()]
    usual = [r for r in main if r["variant"] is None]
    assert len([r for r in usual if r["selector"] == "sketch"]) == KERNELS + len(SPLIT)
    assert {r["kernel"] for r in usual if r["splits"] == layout.MOST_SPLITS} == set(SPLIT)
    for selector, own in {
        "oracle": SELECTED,
        "quest": SELECTED | {"mark_slots_fwd_kernel", "bound_pages_fwd_kernel"},
        "sign": SELECTED | SIGNED,
        "hash": SELECTED | SIGNED,
    }.items():
        assert sorted(r["kernel"] for r in usual if r["selector"] == selector) == sorted(own)
    assert all(row["spills"] <= FEW_BYTES for row in main)


@pytest.mark.parametrize("arch", [80, 90])
def test_variants_of_settings_compile(rows, arch):
    built = Counter((r["variant"], r["group"]) for r in rows if r["arch"] == arch and r["variant"])
    plain = {("denominator", 8): 2}
    assert built == {(name, MAIN["group"]): count for name, count in VARIANTS.items()} | plain


def test_no_kernel_takes_more_than_it_may(rows):
    for row in rows:
        kernel, where = row["kernel"], (row["head_dim"], row["group"])
        registers, shared = MOST[kernel]
        spilled = MOST_SPILLED.get((kernel, row["selector"], *where), FEW_BYTES)
        if row["splits"] == layout.MOST_SPLITS:
            registers = SPLIT[kernel]
        registers = FEWER_ROUNDS.get((kernel, row["variant"]), registers)
        registers = SURVEYED.get((kernel, row["selector"]), registers)
        if where == WIDEST and kernel in MOST_OF_THE_WIDEST:
            registers, (spilled, shared) = None, MOST_OF_THE_WIDEST[kernel]
        # The compiler keeps to a launch's own limit, so that only its spills tell.
        assert row["limit"] or registers is None or row["registers"] <= registers, row
        assert row["spills"] <= spilled, row
        assert row["shared"] <= shared << 10, row


def test_kernels_of_an_fp8_cache_do_not_spill_but_for_exact_attention(rows):
    fp8 = [r for r in rows if (MAIN | {"cache": r["cache"]}).items() <= r.items() and r["cache"].startswith("fp8")]
    assert len(fp8) == 3 * KERNELS
    assert all(r["spills"] <= FEW_BYTES for r in fp8 if r["kernel"] != "finish_fwd_kernel")
