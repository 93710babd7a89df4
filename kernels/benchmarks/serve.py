"""Decode speed of SGLang on one GPU, geometry of Llama-3.1-8B with dummy weights, CUDA graphs on.

``python kernels/benchmarks/serve.py`` starts a server for each backend, one after another, and prints a Markdown table
and one JSON object a row. Every prompt is prefilled before, so that no prefill falls into the window, in which all
requests decode; latency is the median time between two streamed tokens of a request. Dummy weights make attention
meaningless, so vattention runs at a fixed density: an epsilon that no budget satisfies, and a cap that cuts each.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from decode_gpu import UNREACHABLE
from rich.console import Console

from vattn_sgl.arguments import positive, share, writable
from vattn_sgl.eval.served import totals
from vattn_sgl.server import Server, ServerError, end_by_signal

GEOMETRY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
ARGUMENTS = (
    *("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-prefill-cuda-graph", "--decode-log-interval", "20"),
)
# Prefill by triton for all: flashinfer would compile its own for more than a minute.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "triton": ("triton", ()),
    "flashinfer": ("triton", ("--prefill-attention-backend", "triton", "--decode-attention-backend", "flashinfer")),
    "vattention": ("vattention", ()),
}
OURS = "vattention"
NO_GPU = "no GPU"
SPARE_TOKENS = 256
# Tokens of a request that are not counted: the first come while others still wait.
WARM_UP_TOKENS = 16
_THROUGHPUT = re.compile(r"#running-req: (\d+),.*gen throughput \(token/s\): ([\d.]+)")
console = Console(stderr=True)


@dataclass
class Row:
    """One measurement.

    Attributes
    ----------
    device : str
        The GPU's name.
    backend : str
        Key of `BACKENDS`.
    metrics : bool
        Whether it serves ``/metrics``; ours then exports its counters.
    requests, context : int
        Requests at a time, and tokens of each prompt.
    density : float
        Tokens read over tokens in context, from the device counters; 1 for a dense backend.
    itl_ms : float
        Median time between two tokens of a request.
    tokens_per_second : float
        Tokens of all requests that arrived in the window, over its length.
    log_tokens_per_second : float or None
        What the server's own log says at the full batch, median.
    ratio : float or None
        ``tokens_per_second`` over the best dense backend's of the same run.
    """

    device: str
    backend: str
    metrics: bool
    requests: int
    context: int
    density: float
    itl_ms: float
    tokens_per_second: float
    log_tokens_per_second: float | None
    ratio: float | None = None


def device_name() -> str:
    """The first GPU's, without making a CUDA context here."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return NO_GPU


def prompts(requests: int, context: int) -> list[list[int]]:
    """Random tokens, all prompts different."""
    draw = random.Random(0)
    return [[draw.randrange(1000, GEOMETRY["vocab_size"] - 1000) for _ in range(context)] for _ in range(requests)]


@contextmanager
def running(server: Server, limit: float) -> Iterator[None]:
    """A server for as long as the block lasts, but no longer than a limit in seconds; requests fail once it is over."""

    def waiting(seconds: float) -> None:
        if seconds > limit:
            raise ServerError(f"not ready after {limit:.0f} s:\n{server.tail()}")

    began = time.perf_counter()
    server.start(waiting)
    timer = threading.Timer(limit - (time.perf_counter() - began), server.stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        server.stop()


def stream_all(server: Server, work: list[list[int]], tokens: int) -> list[list[float]]:
    """Arrival times of every request's tokens, all requests at once."""
    arrivals: list[list[float]] = [[] for _ in work]
    failures: list[Exception] = []

    def one(index: int) -> None:
        try:
            arrivals[index] = list(server.stream(work[index], tokens))
        except ServerError as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return arrivals


def speed(arrivals: list[list[float]]) -> tuple[float, float]:
    """Median seconds between two tokens, and tokens per second, while all requests decode."""
    begin, end = max(times[WARM_UP_TOKENS] for times in arrivals), min(times[-1] for times in arrivals)
    inside = [[t for t in times if begin <= t <= end] for times in arrivals]
    gaps = [later - earlier for times in inside for earlier, later in pairwise(times)]
    return median(gaps), len(gaps) / (end - begin)


def logged(server: Server, requests_: int) -> float | None:
    """Median throughput in the server's log, of the lines that tell of the full batch."""
    found = _THROUGHPUT.findall(server.log.read_text(errors="replace"))
    # The first line of a batch covers the time before it too.
    full = [float(rate) for running, rate in found if int(running) == requests_][1:]
    return median(full) if full else None


def measure(
    folder: Path, name: str, density: float, work: list[list[int]], options: argparse.Namespace, cache: str
) -> Row:
    """Start a server, prefill, decode, and stop it; `ServerError` if that takes longer than the limit."""
    backend, extra = BACKENDS[name]
    context = len(work[0])
    env = {}
    if name == OURS:
        env = {"VATTN_EPSILON": str(UNREACHABLE), "VATTN_CAP": str(density), "VATTN_CACHE": cache}
    length = context + options.tokens + SPARE_TOKENS
    arguments = (
        *ARGUMENTS,
        *("--context-length", str(length), "--max-total-tokens", str((length + SPARE_TOKENS) * len(work))),
        *("--max-running-requests", str(len(work)), "--cuda-graph-max-bs-decode", str(len(work))),
        *("--chunked-prefill-size", str(options.chunk)),
        *extra,
    )
    server = Server(
        folder, backend, arguments, env, admin_key=secrets.token_urlsafe(8), metrics=not options.without_metrics
    )
    began = time.perf_counter()

    def passed() -> str:
        return f"{name}: {time.perf_counter() - began:.0f} s"

    with running(server, options.limit):
        console.print(f"{passed()}: ready")
        for prompt in work:
            server.generate(prompt, 2)
        console.print(f"{passed()}: prefilled")
        stream_all(server, work, WARM_UP_TOKENS)
        before = totals(server.admin("GET", "status")) if name == OURS else (0.0, 0.0)
        latency, rate = speed(stream_all(server, work, options.tokens))
        after = totals(server.admin("GET", "status")) if name == OURS else (1.0, 1.0)
        console.print(f"{passed()}: measured")
    read = (after[0] - before[0]) / (after[1] - before[1])
    size = not options.without_metrics, len(work), context
    return Row(device_name(), name, *size, read, 1e3 * latency, rate, logged(server, len(work)))


def show(rows: list[Row]) -> None:
    """Table and JSON of what has been measured so far."""
    dense = [row.tokens_per_second for row in rows if row.backend != OURS]
    print("\n| backend | requests x context | density | ITL, ms | tokens/s | server's log | ratio to best dense |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        row.ratio = row.tokens_per_second / max(dense) if dense else None
        log = "" if row.log_tokens_per_second is None else f"{row.log_tokens_per_second:.0f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        name = row.backend if row.metrics else f"{row.backend}, no metrics"
        size = f"{row.requests} x {row.context}"
        figures = f"{row.density:.3f} | {row.itl_ms:.2f} | {row.tokens_per_second:.0f} | {log} | {ratio}"
        print(f"| {name} | {size} | {figures} |")
    for row in rows:
        print(json.dumps(asdict(row)))


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["triton", "vattention", "flashinfer"])
    parser.add_argument("--densities", type=share, nargs="+", default=[0.1], help="one server of vattention for each")
    parser.add_argument("--requests", type=positive, default=16)
    parser.add_argument("--context", type=positive, default=32768)
    parser.add_argument("--tokens", type=positive, default=192, help=f"of each answer, more than {WARM_UP_TOKENS}")
    parser.add_argument("--layers", type=positive, default=GEOMETRY["num_hidden_layers"])
    parser.add_argument("--chunk", type=positive, default=16384, help="tokens of a prefill chunk")
    parser.add_argument("--without-metrics", action="store_true", help="servers without --enable-metrics")
    parser.add_argument("--limit", type=positive, default=260, help="seconds for each server")
    parser.add_argument("--json", type=writable)
    options = parser.parse_args()
    longest = GEOMETRY["max_position_embeddings"] - options.tokens - SPARE_TOKENS
    if options.context > longest:
        parser.error(f"--context {options.context}, expected at most {longest} with --tokens {options.tokens}")
    if options.tokens <= WARM_UP_TOKENS + 1:
        parser.error(f"--tokens {options.tokens}, expected more than {WARM_UP_TOKENS + 1}")
    if device_name() == NO_GPU:
        print("no GPU here: run this on a GPU; `make bench` measures a CPU", file=sys.stderr)
        return 2
    end_by_signal()
    failed = False
    work = prompts(options.requests, options.context)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="vattn-serve-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(GEOMETRY | {"num_hidden_layers": options.layers}))
        for name in options.backends:
            for density in options.densities if name == OURS else [1.0]:
                try:
                    rows.append(measure(folder, name, density, work, options, scratch))
                    show(rows[-1:])
                except ServerError as error:
                    failed = True
                    console.print(f"{name}: failed: {error}", markup=False, soft_wrap=True)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
