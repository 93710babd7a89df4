"""One carveout, the share of a multiprocessor's L1 memory that is shared memory, for all kernels of a step.

CUDA chooses it kernel by kernel, and a multiprocessor changes it only while it is empty: programs of a launch could not
begin beside those of the launch ahead. Figures: ``kernels/benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from triton import knobs

from vattn_kernels.triton import layout

# Of a multiprocessor's shared memory; what a kernel cannot do without comes before it.
PERCENT = 75
# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver API, which Triton does not expose.
ATTRIBUTE = 9


def share(kernels: Iterable[Any]) -> None:
    """Give every kernel the same carveout when it is loaded onto a GPU.

    Parameters
    ----------
    kernels : iterable of JITFunction
        Those of a step, by whose names Triton tells what it has loaded.
    """
    names = {kernel.fn.__name__ for kernel in kernels}

    def loaded(module: object, function: int, name: str, *_: object) -> None:
        if name in names and layout.carveout_holds(torch.device("cuda", torch.cuda.current_device()), PERCENT):
            # A preference: refused, it costs speed alone.
            ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), ATTRIBUTE, PERCENT)

    knobs.runtime.kernel_load_end_hook.add(loaded)
