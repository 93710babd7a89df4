"""Decode attention on a GPU: ours at fixed densities and at epsilon .05, against the best dense kernels, in one run.

Each case has several layers, so that what one reads is out of the L2 cache when it comes again, and sketches keys by
other queries than those that it asks; a time is the median of replays of a CUDA graph over as many layers as a model
has, in microseconds a layer. Nothing is timed whose output fails its check.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

import vattn_kernels.triton
from vattn_kernels import ops, params, sketch
from vattn_kernels.triton import layout
from vattn_sgl.arguments import shape, share, writable
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry
from vattn_sgl.selectors.sketch import SketchSelector
from vattn_telemetry.counters import CounterLayout

QO_HEADS, KV_HEADS, HEAD_DIM, BITS = 32, 8, 128, 64
# A token's codes and two norms.
SIDE_BYTES = KV_HEADS * (BITS // 8 + 2)
# A token's K and V in bf16.
KV_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
SHAPES = tuple((b, n) for n in (4096, 8192, 32768, 131072) for b in (1, 4, 16, 64))
# Below 2,048 the server reads everything.
SHORT_SHAPES = ((1, 2047), (16, 2047), (64, 2047))
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.025)
EPSILON, DELTA = 0.05, 0.05
# No step certifies it, so that the cap decides what is read.
UNREACHABLE = 1e-6
STEPS_TO_SETTLE = 40
DEFAULTS = Settings()
REPLAYS = 15
# Steps of a layer in one graph, about those of a model, so that its start weighs as little as there.
LAYERS_OF_A_MODEL = 32
# What layers read in turn at the lowest density, side data included: four times an L2 cache.
BYTES_TO_ROTATE = 1 << 28
# Of K and V, whose making takes three times as much; beyond it one layer must do, which no cache holds either.
MOST_BYTES = 64 << 30
COUNTERS = CounterLayout(1)
DENSE_TOLERANCE = 1e-2
# Of bf16 outputs, which a relative error of a whole head feels by its root mean square.
ROUNDING = 5e-3
# Requests times layers that are checked, where a case has as many: one missed needle is much of fewer heads' error. So
# one request of a layer weighs an eighth: it is refused where all its heads are wrong, not where half of them are.
CHECKED = 8
# What is checked of a sample: in how many heads the error may exceed what the step states, more than DELTA as heads of
# a group share their draws; how many times what it states a KV head may err on average; what it may state: an output of
# zeros keeps 1, so a head beyond the last knows nothing; and how much of the error of a draw that knows no scores it
# may have: on a CPU right steps had .03 to .25 of it, steps by other tokens' codes .45 and more.
MOST_BEYOND, MOST_TIMES, MOST_STATED, MOST_OF_UNSCORED = 2 * DELTA, 3.0, 0.99, 1 / 3
# A step certifies in float32.
CERTIFIED = EPSILON * (1 + 1e-3)
# Shapes and densities of which steps are also timed that end after each launch.
CUT_SHAPES, CUT_DENSITIES = ((16, 32768), (4, 131072), (1, 131072)), (0.1, 0.05)
# A step's launches in order, without those of other selectors and of audits.
LAUNCHES = (
    "prepare_fwd_kernel", "select_lists_fwd_kernel", "attend_lists_fwd_kernel", "combine_fwd_kernel",
    "finish_fwd_kernel",
)  # fmt: skip


class WrongOutputError(RuntimeError):
    """An output that fails its check, and so is not timed."""


def empty_side_data(layers: int, slots: int) -> list[torch.Tensor]:
    """Codes, norms and valid bytes of a pool as a server has them, ``[layers, slots, ...]``."""
    geometry = CacheGeometry(layers, slots, KV_HEADS, HEAD_DIM, torch.device("cuda"))
    return [tensor.allocate(geometry) for tensor in SketchSelector.layout(DEFAULTS, geometry)]


class Case:
    """Layers of random K and V with a decaying spectrum, heavy-tailed scores and needles, and their side data."""

    def __init__(self, batch: int, context: int, order: str) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        slots = batch * context + 64
        read_bytes = slots * (min(DENSITIES) * KV_BYTES + SIDE_BYTES)
        self.batch, self.context = batch, context
        self.layers = min(max(2, math.ceil(BYTES_TO_ROTATE / read_bytes)), max(1, MOST_BYTES // (slots * KV_BYTES)))
        spread = torch.logspace(0.5, -1.0, HEAD_DIM, device="cuda")

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        def queries(number: int) -> torch.Tensor:
            return normal(number, QO_HEADS, HEAD_DIM) * 2.5 / spread.norm() * HEAD_DIM**0.5

        kept = context - context // 4
        table = torch.arange(batch * context, device="cuda")
        if order == "interleaved":
            # Decoding all requests at once leaves the last quarter of each so.
            tail = table[batch * kept :].view(-1, batch).T
            table = torch.cat([table[: batch * kept].view(batch, kept), tail], 1)
        self.kv_indices = table.view(batch, context).to(torch.int32).contiguous()
        self.seq_lens = torch.full((batch,), context, dtype=torch.int64, device="cuda")
        self.q, self.k, self.v, self.side, self.state = [], [], [], [], []
        for _ in range(self.layers):
            q = queries(batch)
            k = normal(slots, KV_HEADS, HEAD_DIM) * spread
            # Heavy tails: one key in a hundred is half as long again; needles: 16 keys a request look like a query.
            k *= 1 + 0.5 * (torch.rand(slots, 1, 1, generator=generator, device="cuda") < 0.01)
            needles = torch.randint(context, (batch, 16), generator=generator, device="cuda")
            k[self.kv_indices.gather(1, needles).long()] += (0.8 * q[:, :: QO_HEADS // KV_HEADS])[:, None]
            self.q.append(q.bfloat16())
            self.k.append(k.bfloat16())
            self.v.append((normal(slots, KV_HEADS, HEAD_DIM) + 1).bfloat16())
            if not self.side:
                self.sketch = self.tables(queries(DEFAULTS.calibration_tokens), self.k[-1])
            self.side.append(self.sketched(self.sketch, self.k[-1], self.v[-1]))
            self.state.append(torch.zeros(batch, QO_HEADS, ops.STATE_WIDTH, device="cuda"))
        self.rows = torch.arange(batch, device="cuda")
        self.covered = torch.tensor([2**31 - 1], dtype=torch.int32, device="cuda")
        self.out = torch.full_like(self.q[0], float("nan"))
        self.stats = torch.full((batch, QO_HEADS, len(ops.STATS)), float("nan"), device="cuda")
        self.counters = COUNTERS.allocate("cuda")[0]
        self.edges = COUNTERS.edge_tensors("cuda")
        self.params = torch.empty(params.PARAMS_WIDTH, device="cuda")
        self.step: dict[str, Any] = {
            "sm_scale": HEAD_DIM**-0.5, "layer_id": 0, "seed": 0, "sampler": "proportional", "target": "output",
            "selector": "sketch", "dense_below": 0, "top_k_count": -1, "top_k_share": 0.0, "audit_rate": 0.0,
            **DEFAULTS.model_dump(include={"sink", "window", "pilot", "pilot_min", "cap", "floor"}),
        }  # fmt: skip

    @staticmethod
    def tables(q: torch.Tensor, k: torch.Tensor) -> sketch.SketchTables:
        """The sketch that such queries and keys are given."""
        sample = k[torch.randperm(k.shape[0], device="cuda")[:4096]].float().cpu()
        moments = sketch.Moments.zeros(1, KV_HEADS, HEAD_DIM, "cpu")
        moments.add(0, q.float().cpu(), sample)
        return sketch.solve(moments, sample[None, :512], BITS, lanes=True).to("cuda")

    @staticmethod
    def sketched(t: sketch.SketchTables, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Side data of every slot and the tables that made them."""
        side = [tensor[0] for tensor in empty_side_data(1, k.shape[0])]
        every = torch.arange(k.shape[0], device="cuda")
        ops.encode(k, v, every, t.mean[0], t.key_basis[0], t.steps[0], t.fields[0], *side)
        return *side, t.mean[0], t.query_basis[0], t.steps[0], t.fields[0]

    def decode(self, layer: int, **settings: Any) -> torch.Tensor:
        """One step of one layer by our op."""
        ops.decode(
            self.q[layer], self.k[layer], self.v[layer], self.kv_indices, self.seq_lens, *self.side[layer], self.params,
            self.covered, *self.edges, self.out, self.stats, self.counters, list(COUNTERS.offsets),
            **(self.step | settings), state=self.state[layer], state_rows=self.rows,
        )  # fmt: skip
        return self.out

    def settle(self, epsilon: float, cap: float) -> None:
        """Forget the state and take as many steps as the scales need."""
        self.params.copy_(torch.tensor(params.pack(epsilon, DELTA, "f8")))
        for state in self.state:
            state.zero_()
        for _ in range(STEPS_TO_SETTLE):
            for layer in range(self.layers):
                self.decode(layer, cap=cap)

    def errors(self, layer: int, request: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Relative errors of every head of a request, float64: of an output, and of a draw that knows no scores.

        The latter is what as many tokens, drawn with equal chances, would err by: the root mean square of a Poisson
        sample's weighted mean, to first order; at most the 1 of an output of zeros.
        """
        slots = self.kv_indices[request].long()
        k, v = self.k[layer][slots].double(), self.v[layer][slots].double()
        q = self.q[layer][request].double().view(KV_HEADS, -1, HEAD_DIM)
        p = torch.softmax(torch.einsum("hgd,nhd->hgn", q, k) * self.step["sm_scale"], -1)
        exact = torch.einsum("hgn,nhd->hgd", p, v)
        norm = exact.norm(dim=-1).flatten()
        p = p.square_()
        apart = torch.einsum("hgn,nh->hg", p, v.square().sum(-1)) + p.sum(-1) * exact.square().sum(-1)
        apart -= 2 * (torch.einsum("hgn,nhd->hgd", p, v) * exact).sum(-1)
        density = self.stats[request, :, ops.STATS.index("density")].double()
        uniform = (apart.flatten().clamp_min(0) * (1 / density - 1).clamp_min(0)).sqrt() / norm
        error = (out[request].double() - exact.reshape(QO_HEADS, HEAD_DIM)).norm(dim=-1) / norm
        return error, uniform.clamp_max(1)


def flashinfer(case: Case) -> Callable[[int], torch.Tensor]:
    """FlashInfer's paged decode with tensor cores, page size 1."""
    import flashinfer as library

    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    pointers = torch.arange(case.batch + 1, dtype=torch.int32) * case.context
    last = torch.ones(case.batch, dtype=torch.int32)
    wrapper.plan(
        pointers.cuda(), case.kv_indices.flatten(), last.cuda(), QO_HEADS, KV_HEADS, HEAD_DIM, 1,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    out = torch.empty_like(case.q[0])

    def run(layer: int) -> torch.Tensor:
        wrapper.run(case.q[layer], (case.k[layer].unsqueeze(1), case.v[layer].unsqueeze(1)), out=out)
        return out

    return run


def sglang_triton(case: Case) -> Callable[[int], torch.Tensor]:
    """SGLang's Triton decode with as many splits as its backend takes at most."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    splits, batch = 16, case.batch
    pointers = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * case.context
    indices = case.kv_indices.flatten().long()
    logits = torch.empty(batch, QO_HEADS, splits, HEAD_DIM, device="cuda")
    lse = torch.empty(batch, QO_HEADS, splits, device="cuda")
    number = torch.full((batch,), splits, dtype=torch.int32, device="cuda")
    out = torch.empty_like(case.q[0])

    def run(layer: int) -> torch.Tensor:
        decode_attention_fwd(
            case.q[layer], case.k[layer], case.v[layer], out, pointers, indices, logits, lse, number, splits,
            case.step["sm_scale"], 1.0, 1.0,
        )  # fmt: skip
        return out

    return run


def time_us(run: Callable[[int], Any], layers: int) -> float:
    """Median time of a layer in microseconds, by replays of one graph."""
    for layer in range(layers):
        run(layer)
    torch.cuda.synchronize()
    passes = -(-LAYERS_OF_A_MODEL // layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for layer in range(layers):
                run(layer)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (passes * layers))
    return sorted(times)[REPLAYS // 2]


def stages_us(run: Callable[[int], Any], layers: int) -> dict[str, float]:
    """Mean time of each kernel a step, by the profiler, without overlap; what lies between launches is not in it."""
    steps = 3
    # What the profiler leaves attached costs every later launch a third of a microsecond.
    os.environ["TEARDOWN_CUPTI"] = "1"
    # A launch that overlaps the one ahead is timed with what it waits.
    layout.LAUNCH.overlap = False
    try:
        run(0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                for layer in range(layers):
                    run(layer)
            torch.cuda.synchronize()
    finally:
        layout.LAUNCH.overlap = True
    total: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.name.endswith("_fwd_kernel"):
            total[event.name.removesuffix("_fwd_kernel")] += event.device_time / (steps * layers)
    return dict(total)


def update_us(case: Case) -> float:
    """Microseconds a layer of making the side data of each request's last token, by one launch for a model's layers.

    Refused where they are not those that `Case.sketched` made of the same tokens among all others.
    """
    layers, slots, t = LAYERS_OF_A_MODEL, case.kv_indices[:, -1].long(), case.sketch
    k, v = ([pool[layer % case.layers] for layer in range(layers)] for pool in (case.k, case.v))
    tables = t.mean, t.key_basis, t.steps, t.fields
    # A server finds none of them in the cache, nor most new tokens' K and V, which are here.
    copies = math.ceil(BYTES_TO_ROTATE / (layers * sum(x.nbytes for x in tables)))
    models = [[x.expand(layers, *x.shape[1:]).contiguous() for x in tables] for _ in range(copies)]
    side = empty_side_data(layers, len(k[0]))

    def run(model: int) -> None:
        ops.encode_layers(k, v, slots, *models[model], *side)

    run(0)
    for layer in range(layers):
        expected = case.side[layer % case.layers][: len(side)]
        if not all(torch.equal(made[layer, slots], kept[slots]) for made, kept in zip(side, expected, strict=True)):
            raise WrongOutputError(f"side data of layer {layer} differ from those of the same tokens in a whole pool")
    return time_us(run, copies) / layers


class NoLaunch:
    """Stands for a kernel, and launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What takes the arguments."""
        return lambda *arguments, **constants: None


def until_us(case: Case, run: Callable[[int], Any]) -> dict[str, float]:
    """Time of steps that end after each launch: what a stage adds where launches overlap, as they do when served."""
    kernels = {name: getattr(vattn_kernels.triton, name) for name in LAUNCHES}
    settled = [state.clone() for state in case.state]
    found = {}
    try:
        for name in reversed(LAUNCHES):
            for state, kept in zip(case.state, settled, strict=True):
                state.copy_(kept)
            found[name.removesuffix("_fwd_kernel")] = time_us(run, case.layers)
            setattr(vattn_kernels.triton, name, NoLaunch())
    finally:
        for name, kernel in kernels.items():
            setattr(vattn_kernels.triton, name, kernel)
        for state, kept in zip(case.state, settled, strict=True):
            state.copy_(kept)
    return dict(reversed(found.items()))


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_us(lambda layer: torch.add(source, 1.0, out=target), 1) * 1e-6)


def to_check(case: Case) -> tuple[int, list[int]]:
    """How many layers are checked, and which requests of each: the first, the last, and more where layers are few."""
    layers = min(case.layers, math.ceil(CHECKED / min(case.batch, 2)))
    requests = min(case.batch, math.ceil(CHECKED / layers))
    return layers, [round(at) for at in torch.linspace(0, case.batch - 1, requests).tolist()]


def checked(
    case: Case, run: Callable[[int], torch.Tensor], name: str, is_sampled: bool, is_certified: bool = False
) -> dict[str, float]:
    """Mean error, median half-width and share of heads beyond it, or a refusal to time what is wrong.

    A dense output is wrong by its errors, a sampled one by how many exceed what it states and by how much, by being
    little better than a draw that knows no scores, and, where `EPSILON` is to hold, by any head that states more.
    """
    errors, stated, unscored, is_finite = [], [], [], True
    layers, requests = to_check(case)
    for layer in range(layers):
        case.out.fill_(float("nan"))
        case.stats.fill_(float("nan"))
        out = run(layer)
        widths = case.stats[..., ops.STATS.index("half_width")].double()
        widths = widths if is_sampled else torch.zeros_like(widths)
        is_finite &= bool(torch.isfinite(out).all() and torch.isfinite(widths).all())
        for request in requests:
            error, uniform = case.errors(layer, request, out)
            errors.append(error)
            unscored.append(uniform)
            stated.append(widths[request])
    error, half_width = torch.stack(errors), torch.stack(stated)
    tolerance, most = (ROUNDING, MOST_BEYOND) if is_sampled else (DENSE_TOLERANCE, 0.0)
    beyond = float(((error > half_width + tolerance) | (half_width > MOST_STATED)).double().mean())
    mean, unscored_mean = float(error.mean()), float(torch.stack(unscored).mean()) if is_sampled else math.inf
    by_head, stated_by_head = (x.view(len(x), KV_HEADS, -1).mean((0, 2)) for x in (error, half_width))
    excess = float((by_head - MOST_TIMES * stated_by_head).max())
    if not (is_finite and beyond <= most and excess <= tolerance):
        raise WrongOutputError(
            f"{name} at {case.batch}x{case.context}: errors of up to {float(error.max()):.3g} where up to "
            f"{float(half_width.max()):.3g} is stated, {beyond:.1%} of heads beyond that and {tolerance}, expected at "
            f"most {most:.0%}; a KV head errs by {excess:.3g} more than {MOST_TIMES} times what it states on average"
        )
    if not mean <= MOST_OF_UNSCORED * unscored_mean + tolerance:
        raise WrongOutputError(
            f"{name} at {case.batch}x{case.context}: a mean error of {mean:.3g}, expected at most "
            f"{MOST_OF_UNSCORED:.2f} of the {unscored_mean:.3g} of a draw that knows no scores"
        )
    if is_certified and not half_width.max() <= CERTIFIED:
        raise WrongOutputError(
            f"{name} at {case.batch}x{case.context}: a head states {float(half_width.max()):.3g} where epsilon "
            f"{EPSILON} is to hold"
        )
    return {"error": mean, "half_width": float(half_width.median()), "beyond": beyond}


def copy_us(batch: int, context: int, token_bytes: float, bandwidth: float) -> float:
    """Microseconds of a layer in which so many bytes of each token are copied at so many terabytes a second."""
    return batch * context * token_bytes / bandwidth / 1e6


def bench(
    batch: int, context: int, order: str, densities: tuple[float, ...], bandwidth: float
) -> tuple[list[dict[str, Any]], int]:
    """Rows of one shape, and how many outputs failed their check and have none."""
    case = Case(batch, context, order)
    dense: dict[str, float] = {}
    makers: dict[str, Callable[[Case], Callable[[int], torch.Tensor]]] = {
        "ours": lambda case: lambda layer: case.decode(layer, dense_below=1 << 30),
        **({"flashinfer": flashinfer} if importlib.util.find_spec("flashinfer") else {}),
        **({"sglang_triton": sglang_triton} if importlib.util.find_spec("sglang") else {}),
    }
    case.params.copy_(torch.tensor(params.pack(EPSILON, DELTA, "f8")))
    for name, make in makers.items():
        run = make(case)
        checked(case, run, name, is_sampled=False)
        dense[name] = time_us(run, case.layers)
    others = min([t for n, t in dense.items() if n != "ours"], default=dense["ours"])
    best = min(dense.values())
    kv_us = copy_us(batch, context, KV_BYTES, bandwidth / 1e12)
    head = f"{batch}x{context} {order}: dense " + ", ".join(f"{n} {t:.0f}" for n, t in dense.items())
    print(f"{head} us; K and V at copy bandwidth {kv_us:.0f} us", flush=True)
    common = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_tb_s": round(bandwidth / 1e12, 2), "batch": batch, "context": context, "order": order,
        "side_bytes": batch * context * SIDE_BYTES, "dense_us": round(best, 1),
    }  # fmt: skip

    def row(density: float, stage: str, us: float, **more: Any) -> dict[str, Any]:
        figures = {"density": round(density, 4), "stage": stage, "us": round(us, 2), "ratio": round(best / us, 2)}
        return common | figures | more

    rows = [row(1.0, f"dense:{n}", t) for n, t in dense.items()]
    refused = 0
    everything = stages_us(makers["ours"](case), case.layers)
    shown = " ".join(f"{n} {t:.1f}" for n, t in everything.items())
    print(f"  reading everything: {others / dense['ours']:.2f}x the best other dense; {shown}", flush=True)
    try:
        update = update_us(case)
        print(f"  side data of new tokens, one launch a step and in no total: {update:.2f} us a layer", flush=True)
        rows.append(row(1.0, "update", update))
    except WrongOutputError as wrong:
        print(f"  not timed: {wrong}", flush=True)
        refused += 1
    for density in (*densities, None) if densities else ():
        cap, epsilon = (1.0, EPSILON) if density is None else (density, UNREACHABLE)
        label = f"epsilon {EPSILON}" if density is None else f"cap {density}"
        case.settle(epsilon, cap)

        def run(layer: int, cap: float = cap) -> torch.Tensor:
            return case.decode(layer, cap=cap)

        try:
            more = checked(case, run, label, is_sampled=True, is_certified=density is None)
        except WrongOutputError as wrong:
            print(f"  not timed: {wrong}", flush=True)
            refused += 1
            continue
        case.counters.zero_()
        total = time_us(run, case.layers)
        real = float(case.counters[COUNTERS.block("read")].sum() / case.counters[COUNTERS.block("context")].sum())
        stages = stages_us(run, case.layers)
        shown = " ".join(f"{n} {t:.1f}" for n, t in stages.items())
        more["gather_ratio"] = total / (kv_us * real)
        checks = f"error {more['error']:.4f} of {more['half_width']:.4f} stated, beyond in {more['beyond']:.1%}"
        print(f"  {label}: density {real:.4f}, {checks}, {total:.1f} us, {best / total:.2f}x dense, "
              f"{more['gather_ratio']:.2f} of its bytes' time; {shown}", flush=True)  # fmt: skip
        rows.append(row(real, "total", total, wanted=label, **{name: float(f"{x:.4g}") for name, x in more.items()}))
        rows += [row(real, n, t, wanted=label) for n, t in stages.items()]
        if order == "in order" and (batch, context) in CUT_SHAPES and density in CUT_DENSITIES:
            ends = until_us(case, run)
            print("    steps that end after " + ", ".join(f"{n} {t:.1f}" for n, t in ends.items()), flush=True)
            rows += [row(real, f"until:{n}", t, wanted=label) for n, t in ends.items()]
    return rows, refused


def main() -> int:
    """Run all shapes, print, and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=writable, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--shapes", nargs="+", type=shape, default=[*SHORT_SHAPES, *SHAPES], help="BATCHxCONTEXT")
    parser.add_argument("--densities", nargs="+", type=share, default=DENSITIES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: run this on a GPU; `make bench` measures a CPU", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, "
          f"side data {SIDE_BYTES // KV_HEADS} bytes a token and KV head", flush=True)  # fmt: skip
    rows: list[dict[str, Any]] = []
    refused = 0
    for batch, context in options.shapes:
        # What the server reads whole is timed at no density.
        densities = () if (batch, context) in SHORT_SHAPES else tuple(options.densities)
        orders = {"in order": densities}
        if (batch, context) == (16, 32768):
            orders["interleaved"] = (0.1, 0.05)
        for order, at in orders.items():
            try:
                found, failed = bench(batch, context, order, at, bandwidth)
                rows += found
                refused += failed
            except torch.OutOfMemoryError:
                print(f"{batch}x{context}: left out, this GPU has too little memory", flush=True)
            except WrongOutputError as wrong:
                print(f"{batch}x{context}: left out: {wrong}", flush=True)
                refused += 1
            torch.cuda.empty_cache()
        options.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if refused:
        print(f"{refused} outputs failed their check and were not timed, see above", file=sys.stderr)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
