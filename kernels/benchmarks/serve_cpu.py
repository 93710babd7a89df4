"""Decode speed of a real server on this CPU: SGLang's torch_native, our dense path and vattention, in one run.

``python kernels/benchmarks/serve_cpu.py`` prints a Markdown table. Speed is taken from the arrival of streamed tokens
while every request of the batch decodes; prompts are prefilled before, so that no prefill falls into the window.
"""

from __future__ import annotations

import argparse
import json
import secrets
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from vattn_sgl import model, texts
from vattn_sgl.arguments import positive, writable
from vattn_sgl.demo import totals
from vattn_sgl.server import Server, end_by_signal

ARGUMENTS = (
    "--dtype",
    "float32",
    "--context-length",
    "8192",
    "--max-total-tokens",
    "56000",
    "--max-running-requests",
    "8",
)
BACKENDS = {
    "torch_native": ("torch_native", {}),
    "vattention, dense path": ("vattention", {"VATTN_DENSE_BELOW": "1000000"}),
    "vattention": ("vattention", {}),
}
BASELINE = "torch_native"
TURNS = 3
console = Console(stderr=True)


@dataclass
class Row:
    """One measurement.

    Attributes
    ----------
    backend : str
        Key of `BACKENDS`.
    context, batch : int
        Tokens in each cache at the first decode step, and requests.
    tokens_per_second : float
        Decoded tokens of the whole batch; median over the turns.
    density : float
        Tokens read over tokens in context; 1 for a dense backend.
    ratio : float
        Speed over `BASELINE`'s.
    limit : float
        Tokens per second if only weights and the K and V of `density` were read, at the measured bandwidth.
    """

    backend: str
    context: int
    batch: int
    tokens_per_second: float
    density: float
    ratio: float = 0.0
    limit: float = 0.0


def bandwidth() -> float:
    """Bytes per second of reading memory larger than the caches, on all cores."""
    block = torch.zeros(256 * 2**20, dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = max(best, block.numel() * 4 / (time.perf_counter() - began))
    return best


def prompts(path: Path, context: int, batch: int) -> list[list[int]]:
    """Different prompts of equal length, so that no request shares another's cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [
        int(i)
        for name in (texts.DEMONSTRATION, texts.CALIBRATION)
        for i in tokenizer(texts.load(name), verbose=False).input_ids
    ]
    shift = (len(ids) - context) // batch
    return [ids[i * shift : i * shift + context] for i in range(batch)]


def decode_speed(server: Server, batch: list[list[int]], tokens: int) -> float:
    """Tokens per second of a batch while all of it decodes."""
    arrivals: list[list[float]] = [[] for _ in batch]

    def one(index: int) -> None:
        arrivals[index] = list(server.stream(batch[index], tokens))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    counted = sum(begin < t <= end for times in arrivals for t in times)
    return counted / (end - begin)


def measure(path: Path, contexts: list[int], batches: list[int], tokens: int) -> list[Row]:
    """All rows. The servers run side by side and decode in turns, so that a slow spell of the machine hits all."""
    rows = []
    with ExitStack() as stack, console.status("starting") as status:
        servers = {}
        for name, (backend, env) in BACKENDS.items():
            server = Server(path, backend, ARGUMENTS, env, admin_key=secrets.token_urlsafe(8))
            server.start(lambda seconds, name=name: status.update(f"{name}: starting, {seconds:.0f} s"))
            servers[name] = stack.enter_context(server)
        for context, batch in product(contexts, batches):
            work = prompts(path, context, batch)
            for (name, server), (i, prompt) in product(servers.items(), enumerate(work)):
                status.update(f"{name}: prefill of {i + 1}/{batch} x {context} tokens")
                server.generate(prompt, 2)
            before = {name: read_tokens(server) for name, server in servers.items()}
            speeds: dict[str, list[float]] = {name: [] for name in servers}
            for turn, (name, server) in product(range(TURNS), servers.items()):
                status.update(f"{name}: decode of {batch} x {context} tokens, turn {turn + 1}/{TURNS}")
                speeds[name].append(decode_speed(server, work, tokens))
            for name, server in servers.items():
                after = read_tokens(server)
                density = (after[0] - before[name][0]) / (after[1] - before[name][1]) if after[1] else 1.0
                rows.append(Row(name, context, batch, median(speeds[name]), density))
                turns = " ".join(f"{speed:.1f}" for speed in speeds[name])
                console.print(f"{name}: {batch} x {context}: {turns} tokens/s, density {density:.3f}")
    return rows


def read_tokens(server: Server) -> tuple[float, float]:
    """Tokens read and in context since the server's start; zeros for another backend."""
    ours = "vattention" in server.command
    return totals(server.admin("GET", "status")) if ours else (0.0, 0.0)


def limits(rows: list[Row], path: Path, bytes_per_second: float) -> None:
    """Fill in what the memory's bandwidth allows."""
    config = json.loads((path / "config.json").read_text())
    weights = (path / "model.safetensors").stat().st_size
    token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    for row in rows:
        row.limit = row.batch * bytes_per_second / (weights + row.batch * row.context * row.density * token)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 6144])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=positive, default=48)
    parser.add_argument("--json", type=writable)
    options = parser.parse_args()
    end_by_signal()
    path = model.fetch()
    speed = bandwidth()
    rows = measure(path, options.contexts, options.batches, options.tokens)
    base = {(r.context, r.batch): r.tokens_per_second for r in rows if r.backend == BASELINE}
    for row in rows:
        row.ratio = row.tokens_per_second / base[row.context, row.batch]
    limits(rows, path, speed)
    print(f"\nMemory read at {speed / 1e9:.1f} GB/s; torch {torch.__version__}, {torch.get_num_threads()} threads.\n")
    print("| context | batch | backend | tokens/s | ratio to torch_native | density | limit by bandwidth, tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda r: (r.context, r.batch)):
        figures = f"{row.tokens_per_second:.1f} | {row.ratio:.2f} | {row.density:.3f} | {row.limit:.0f}"
        print(f"| {row.context} | {row.batch} | {row.backend} | {figures} |")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
