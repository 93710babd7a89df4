"""What the device counters cost a decode step on a GPU: ours with them and without, in turns, in one run.

The kernel without them is the committed one whose `combine.count_group` is replaced by nothing. Times are of
`decode_gpu`, in microseconds a layer; the collector's copy of the counters to the host takes no part.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys

import torch
import triton
from decode_gpu import UNREACHABLE, Case, time_us

from vattn_kernels import triton as gpu
from vattn_kernels.triton import combine
from vattn_sgl.arguments import shape, share

SHAPES = ((1, 32768), (16, 32768), (64, 8192))
TURNS = 5


@triton.jit
def nothing(
    n, low, total, top_k, budget, is_dense, outcome, widths, m_g, budget_edges, error_edges, p_counters,
    at_context, at_read, at_outcome, at_budget, at_error, group, padded_counters,
):  # fmt: skip
    """In place of `combine.count_group`."""


def kernel_without_counters() -> object:
    """`combine_fwd_kernel` of a second copy of its module."""
    assert combine.__spec__ is not None and combine.__spec__.origin is not None
    spec = importlib.util.spec_from_file_location("vattn_combine_uncounted", combine.__spec__.origin)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.count_group = nothing
    return copy.combine_fwd_kernel


def main() -> int:
    """Print both times, their difference and its share of attention and of a whole step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, help="BATCHxCONTEXT")
    parser.add_argument("--cap", type=share, default=0.1)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: run this on a GPU", file=sys.stderr)
        return 2
    kernels = {"on": combine.combine_fwd_kernel, "off": kernel_without_counters()}
    for batch, context in options.shapes:
        case, size = Case(batch, context, "in order"), f"{batch}x{context}"
        case.settle(UNREACHABLE, options.cap)
        times: dict[str, list[float]] = {name: [] for name in kernels}

        def step(layer: int, case: Case = case) -> torch.Tensor:
            return case.decode(layer, cap=options.cap)

        for _ in range(TURNS):
            for name, kernel in kernels.items():
                gpu.combine_fwd_kernel = kernel
                case.counters.zero_()
                times[name].append(time_us(step, case.layers))
                if bool(case.counters.any()) != (name == "on"):
                    raise SystemExit(f"{size}: counters {name}, but they read {case.counters.tolist()}")
        on, off = (statistics.median(times[name]) for name in ("on", "off"))
        spread = max(max(t) - min(t) for t in times.values())
        print(f"{torch.cuda.get_device_name()} {size} density {float(case.stats[..., 0].mean()):.3f}: counters on "
              f"{on:.2f} us, off {off:.2f} us, {on - off:+.2f} us a layer ({(on - off) / off:+.2%} of attention), "
              f"spread of a time {spread:.2f} us", flush=True)  # fmt: skip
        del case, step
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
