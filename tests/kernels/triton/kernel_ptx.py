"""Prints the PTX of a kernel for sm_90, in a process of its own: where Triton interprets it does not compile.

Reads from stdin, as JSON: the kernel's name, its constants, and what numbers are multiples of 16.
"""

from __future__ import annotations

import json
import sys

import triton
from compile_kernels import type_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from vattn_kernels import triton as gpu


def main() -> None:
    """Compile and print."""
    name, constants, multiples, warps = json.load(sys.stdin)
    kernel = getattr(gpu, name)
    signature = {
        n: "constexpr" if n in constants else type_of(n, kernel, "bf16", "bf16", "sketch") for n in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in multiples}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
    print(triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"])


if __name__ == "__main__":
    sys.exit(main())
