"""Compile every GPU kernel without a GPU and print its resources as JSON, one object a line.

Runs in a process of its own: the other tests load the same kernels into Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from vattn_kernels import params
from vattn_kernels.ops import GPU_CACHE_CAPABILITY, SELECTORS, STATE_WIDTH, TARGETS
from vattn_kernels.triton import MOST_AGE, layout
from vattn_kernels.triton.attend import attend_fwd_kernel
from vattn_kernels.triton.attend_gluon import attend_lists_fwd_kernel
from vattn_kernels.triton.audit import audit_fwd_kernel, choose_fwd_kernel
from vattn_kernels.triton.combine import combine_fwd_kernel
from vattn_kernels.triton.finish import finish_fwd_kernel
from vattn_kernels.triton.pages import bound_pages_fwd_kernel, mark_slots_fwd_kernel
from vattn_kernels.triton.prepare import prepare_fwd_kernel
from vattn_kernels.triton.select import select_fwd_kernel
from vattn_kernels.triton.select_gluon import select_lists_fwd_kernel
from vattn_kernels.triton.signature import sign_keys_fwd_kernel, sign_queries_fwd_kernel
from vattn_kernels.triton.top_k import rank_fwd_kernel, top_k_fwd_kernel
from vattn_kernels.triton.uniform import budget_fwd_kernel, list_fwd_kernel
from vattn_kernels.triton.update import update_fwd_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FLOATS = {"sm_scale", "k_scale", "v_scale", "floor", "cap", "rate", "pilot", "top_k_share"}
QUERY, CACHE = {"p_q", "p_out"}, {"p_k", "p_v", "p_bounds"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
# Of most cases; `layout.MOST_SPLITS` of some.
FEW_SPLITS = 8
# Compiled at the main shape, and those kernels that it has no use for at `PLAIN`: what a setting changes, and where.
VARIANTS = {
    "denominator": (
        {"TARGET": TARGETS.index("denominator")},
        (
            *(select_lists_fwd_kernel, combine_fwd_kernel, finish_fwd_kernel, budget_fwd_kernel),
            *(select_fwd_kernel, attend_fwd_kernel),
        ),
    ),
    # Computes what ``numerator`` does, and the denominator's width beside it.
    "sdpa": (
        {"TARGET": TARGETS.index("sdpa"), "TABLE": params.SPLIT_TABLE},
        (combine_fwd_kernel, finish_fwd_kernel, budget_fwd_kernel),
    ),
    "capped": ({"CAPPED": True}, (finish_fwd_kernel,)),
    # Its launches do not overlap.
    "uniform": (
        {"UNIFORM": True, "DEPENDENT": False},
        (prepare_fwd_kernel, attend_lists_fwd_kernel, finish_fwd_kernel),
    ),
    "after the pilot": ({"IS_PILOT": False}, (budget_fwd_kernel,)),
    "audit": ({"AUDIT": True}, (finish_fwd_kernel,)),
}
MAIN, PLAIN = ("bf16", "bf16", 128, 4, 2), ("bf16", "bf16", 128, 8, 4)
# Whose survey has the most scores a thread where nothing spills.
WIDE_GROUP = ("bf16", "bf16", 128, 16, 2)
WITHOUT_TENSOR_CORES = {select_fwd_kernel, attend_fwd_kernel}
# Selectors whose rows are of the cache's type.
ROWS_OF_NUMBERS = {"oracle", "quest"}
TYPES = {
    "p_kv_indices": "i32", "p_seq_lens": "i64", "p_fields": "i32", "p_covered": "i32", "p_state_rows": "i64",
    "p_mode": "i32", "p_valid": "u8", "p_norms": "u8", "p_entries": "i32", "p_counts": "i32", "p_counters": "fp64",
    "p_nets": "fp32", "p_new": "i64", "p_arrivals": "i32", "p_used": "i32", "p_barrier": "i32", "p_pools": "i64",
    "p_listed": "i32", "p_attended": "i32", "p_ranks": "i32", "p_plan": "i32",
}  # fmt: skip


def shapes(arch: int, dtype: str, cache: str, head_dim: int, group: int, words: int):
    """Every kernel with the constants of one model and sketch."""
    kv, groups, power = 8, 3 * words, 1 << (head_dim - 1).bit_length()
    width = max(16, 1 << (2 * group - 1).bit_length())
    coded = 1 << (4 * groups - 1).bit_length()
    padded = 1 << (group - 1).bit_length()
    common = {"HKV": kv, "G": group, "D": head_dim, "DP": power, "SIGNALS": layout.MOST_SPLITS, "DEPENDENT": arch >= 90}
    launch = layout.LAUNCH
    sketch = {"R": head_dim, "GROUPS": groups, "WORDS": words, "DP4A": True, "SELECTOR": 0, "p_valid": None}
    merge = common | {
        "GP": padded, "WIDTH": width, "SPLITS": FEW_SPLITS, "MOST": layout.MOST_LISTS, "STATE": STATE_WIDTH,
        "TARGET": 0, "TABLE": params.TABLE, "POINTS": params.TABLE_POINTS, "PER_UNIT": params.TABLE_STEPS_PER_UNIT,
        "BUDGET_EDGES": 12, "BUDGET_EDGES_P": 16,
        "ERROR_EDGES": 10, "ERROR_EDGES_P": 16, "COUNTERS_P": 64,
    }  # fmt: skip
    attend = {"BN": launch.attend_block, "WIDE": dtype == "fp16"}
    survey = {"UNIFORM": False, "SURVEYED": layout.surveyed(group)}
    yield prepare_fwd_kernel, launch.prepare_warps, common | {
        "GP": max(16, padded), "R": head_dim, "C": coded, "CODES": 4 * groups, "F": launch.prepare_block,
        "WIDTH": STATE_WIDTH, "MOST_AGE": MOST_AGE, "SELECTOR": 0, "UNIFORM": False,
    }  # fmt: skip
    warps = layout.LISTS.value
    few = {"LEAST": layout.LEAST_SPLITS, "ROWS_P": layout.LEAST_ROWS}
    if layout.tensor_cores_score(group, words):
        yield select_lists_fwd_kernel, warps, merge | sketch
    else:
        yield select_fwd_kernel, warps, merge | sketch
    if layout.one_warp_attends(DTYPES[cache], head_dim, group):
        yield attend_lists_fwd_kernel, 1, merge | sketch | survey
    else:
        yield attend_fwd_kernel, warps, merge | sketch | attend | survey
    yield combine_fwd_kernel, 1, merge
    yield finish_fwd_kernel, warps, merge | sketch | attend | few | {
        "EXACT_BN": layout.exact_block(power), "STAGES": launch.exact_stages, "CAPPED": False, "UNIFORM": False,
        "AUDIT": False, "p_plan": None,
    }  # fmt: skip
    yield rank_fwd_kernel, warps, merge | sketch
    yield top_k_fwd_kernel, launch.uniform_warps, merge
    yield list_fwd_kernel, launch.uniform_warps, merge
    yield budget_fwd_kernel, 1, merge | {"IS_PILOT": True}
    yield choose_fwd_kernel, 1, common
    yield audit_fwd_kernel, 4, merge | few | {"AUDIT_EDGES": 10, "AUDIT_EDGES_P": 16}
    yield update_fwd_kernel, 4, {
        "HKV": 8, "D": head_dim, "DP": power, "R": head_dim, "C": coded, "F": min(coded, launch.update_block),
        "WORDS": words, "BT": 16,
    }  # fmt: skip


def shapes_of_selectors(arch: int, dtype: str, cache: str, head_dim: int, group: int, words: int):
    """The kernels that differ where the selector is another than ``sketch``, with its name."""
    given = {
        kernel: (warps, constants) for kernel, warps, constants in shapes(arch, dtype, cache, head_dim, group, words)
    }
    _, merge = given[combine_fwd_kernel]
    warps, finish = given[finish_fwd_kernel]
    attend_kernel = attend_lists_fwd_kernel if attend_lists_fwd_kernel in given else attend_fwd_kernel
    attend_warps, attend = given[attend_kernel]
    for i, selector in enumerate(SELECTORS[1:], 1):
        # One signature a query head, by nets of three layers as HashAttention's authors have them.
        net = {"FIRST": 128, "SECOND": 128} if selector == "hash" else {"FIRST": 0, "SECOND": 0}
        each = group if selector == "hash" else 1
        signed = selector in ("sign", "hash")
        absent = {
            "oracle": ("p_norms", "p_valid", "p_mean", "p_query_basis", "p_steps"), "quest": ("p_query_basis",)
        }.get(selector, ())  # fmt: skip
        none = dict.fromkeys(("p_fields", *absent))
        own = none | {"R": 1, "GROUPS": words if signed else 1, "WORDS": each * words if signed else 1, "SELECTOR": i}
        prepare_warps, prepare = given[prepare_fwd_kernel]
        yield selector, prepare_fwd_kernel, prepare_warps, prepare | none | {"R": 1, "C": 16, "CODES": 4, "SELECTOR": i}
        yield selector, select_fwd_kernel, warps, merge | {"DP4A": True} | own
        yield selector, rank_fwd_kernel, warps, merge | {"DP4A": True} | own
        for kernel, own_warps, constants in (
            (attend_kernel, attend_warps, attend),
            (finish_fwd_kernel, warps, finish),
        ):
            yield selector, kernel, own_warps, {n: c for n, c in constants.items() if n != "p_valid"} | own
        if selector == "quest":
            vector = {"D": head_dim, "DP": prepare["DP"]}
            yield selector, mark_slots_fwd_kernel, 4, vector | {"BT": 16}
            yield selector, bound_pages_fwd_kernel, 4, vector
        if signed:
            net |= {"D": head_dim, "LAST": 32 * words}
            yield selector, sign_queries_fwd_kernel, 4, net | {"HQ": 8 * group}
            yield selector, sign_keys_fwd_kernel, 4, net | {"EACH": each, "CENTRED": selector == "sign"}


def shapes_of_variants(arch: int, dtype: str, cache: str, head_dim: int, group: int, words: int):
    """The kernels of `VARIANTS`, with the variant's name."""
    given = {
        kernel: (warps, constants) for kernel, warps, constants in shapes(arch, dtype, cache, head_dim, group, words)
    }
    for variant, (changed, kernels) in VARIANTS.items():
        is_main = (dtype, cache, head_dim, group, words) == MAIN
        for kernel in kernels:
            if kernel not in given or not (is_main or kernel in WITHOUT_TENSOR_CORES):
                continue
            warps, constants = given[kernel]
            # Only sampler ``uniform`` plans.
            kept = {n: c for n, c in constants.items() if n != "p_plan" or variant != "uniform"}
            yield variant, kernel, warps, kept | changed


def registers(kernel, constants: dict) -> int | None:
    """The limit that a launch sets."""
    if kernel is select_lists_fwd_kernel:
        return layout.select_registers(constants["G"], constants["WORDS"])
    if kernel is attend_fwd_kernel:
        return layout.attend_registers(constants["WIDTH"], constants["DP"])
    return None


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory from the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found.get("LOCAL", 0))}


def type_of(name: str, kernel, dtype: str, cache: str, selector: str) -> str:
    """Type of an argument that is no constant."""
    if name in QUERY:
        return f"*{dtype}"
    if name in CACHE or ((name == "p_codes" and selector in ROWS_OF_NUMBERS) and kernel is not prepare_fwd_kernel):
        return f"*{cache}"
    if name == "p_codes":
        return "*i8" if kernel is prepare_fwd_kernel else "*i32"
    if name == "p_query" and selector == "sketch" and kernel is not prepare_fwd_kernel:
        return "*i8"
    if name.startswith("p_"):
        return f"*{TYPES.get(name, 'fp32')}"
    return "fp32" if name in FLOATS else "i32"


def main() -> None:
    models = (
        MAIN, ("bf16", "bf16", 64, 3, 2), ("fp16", "fp16", 96, 1, 4),
        ("bf16", "bf16", 256, 16, 2), PLAIN, WIDE_GROUP,
        ("bf16", "fp8e5", 128, 4, 2), ("bf16", "fp8e4nv", 128, 4, 2), ("fp16", "fp8e4nv", 96, 1, 4),
        ("fp16", "fp16", 256, 16, 4), ("bf16", "fp8e4nv", 256, 16, 4),
    )  # fmt: skip
    for arch in (80, 90):
        for model in models[: int(sys.argv[1])] if sys.argv[1:] else models:
            dtype, cache, head_dim, group, words = model
            if divmod(arch, 10) < GPU_CACHE_CAPABILITY.get(DTYPES[cache], (0, 0)):
                continue
            kernels = [("sketch", None, *kernel) for kernel in shapes(arch, *model)]
            if model in (models[0], models[-2]):
                kernels += [(selector, None, *kernel) for selector, *kernel in shapes_of_selectors(arch, *model)]
                # As few rows as there can be, with the most splits each.
                most = {"SPLITS": layout.MOST_SPLITS}
                kernels += [
                    (selector, None, kernel, layout.combine_warps(layout.MOST_SPLITS), given | most)
                    for selector, _, kernel, _, given in kernels
                    if kernel in (combine_fwd_kernel, budget_fwd_kernel)
                ]
            if model == WIDE_GROUP:
                selected = shapes_of_selectors(arch, *model)
                kernels += [(selector, None, *k) for selector, *k in selected if k[0] is attend_fwd_kernel]
            if model in (MAIN, PLAIN):
                kernels += [("sketch", *kernel) for kernel in shapes_of_variants(arch, *model)]
            for selector, variant, kernel, warps, given in kernels:
                constants = {name: value for name, value in given.items() if name in kernel.arg_names}
                signature = {
                    name: "constexpr" if name in constants else type_of(name, kernel, dtype, cache, selector)
                    for name in kernel.arg_names
                }
                aligned = {
                    (i,): [["tt.divisibility", 16]]
                    for i, name in enumerate(kernel.arg_names)
                    if name not in constants
                    and (
                        name.startswith("p_")
                        or name.endswith("_stride")
                        or (name == "code_head" and selector in ROWS_OF_NUMBERS)
                    )
                }
                kind = GluonASTSource if kernel.is_gluon() else ASTSource
                source = kind(kernel, signature, constants, aligned)
                options = {"num_warps": warps, "maxnreg": registers(kernel, constants)}
                built = triton.compile(source, GPUTarget("cuda", arch, 32), options=options)
                row = {
                    "kernel": kernel.fn.__name__, "selector": selector, "variant": variant, "arch": arch,
                    "dtype": dtype, "cache": cache, "head_dim": head_dim, "group": group, "words": words,
                    "threads": 32 * warps, "splits": constants.get("SPLITS", FEW_SPLITS),
                    "limit": options["maxnreg"], "shared": built.metadata.shared,
                    **resources(built.asm["cubin"]),
                }  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
