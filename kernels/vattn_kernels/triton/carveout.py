"""One carveout, the share of a multiprocessor's L1 memory that is shared memory, for all kernels of a step.

CUDA chooses it kernel by kernel, and a multiprocessor changes it only while it is empty: programs of a launch could not
begin beside those of the launch ahead. Figures: ``kernels/benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import torch
from triton import knobs

from vattn_kernels.triton import layout

# Of a multiprocessor's shared memory, or more where it takes more to hold what `layout.finish_programs` counts on.
PERCENT = 75
# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver API, which Triton does not expose.
ATTRIBUTE = 9


def percent_of(device: torch.device) -> int | None:
    """Share that all kernels of a step ask for; None where CUDA chooses, as one program of ``finish`` runs at once.

    Parameters
    ----------
    device : torch.device
        Where the cache lives.
    """
    needed, held = layout.finish_shared(128), layout.shared_memory(device)
    return max(PERCENT, math.ceil(100 * needed / held)) if needed <= held else None


def share(kernels: Iterable[Any]) -> None:
    """Give every kernel the same carveout when it is loaded onto a GPU.

    Parameters
    ----------
    kernels : iterable of JITFunction
        Those of a step, by whose names Triton tells what it has loaded.

    Raises
    ------
    RuntimeError
        When a kernel is loaded, if CUDA refuses: programs of ``finish`` that wait for each other would not fit.
    """
    names = {kernel.fn.__name__ for kernel in kernels}

    def loaded(module: object, function: int, name: str, *_: object) -> None:
        percent = percent_of(torch.device("cuda", torch.cuda.current_device())) if name in names else None
        if percent is None:
            return
        error = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), ATTRIBUTE, percent)
        if error:
            raise RuntimeError(
                f"vattn: CUDA answered {error}, expected 0, when {name} asked for {percent} % of shared memory, which "
                "programs that wait for each other need. Check the driver's version"
            )

    knobs.runtime.kernel_load_end_hook.add(loaded)
