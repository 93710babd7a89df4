"""Inputs of the decode op, shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vattn_kernels import line, ops, pages, params, quantiles, signature, sketch
from vattn_kernels.reference import quest as reference_quest
from vattn_kernels.reference import signature as reference_signature

EDGES = torch.tensor([0.01, 0.05, 0.1])
BUDGET_EDGES = torch.tensor([64.0, 256.0, 1024.0])
OFFSETS = [0, 1, 6, 10, 15, 20, 22]
WIDTH = 27
UNLIMITED = 2**31 - 1
# Op that makes a selector's side data.
ENCODERS = {"sketch": "encode", "quest": "encode_pages", "sign": "encode_signature", "hash": "encode_signature"}
# Dtype of a cache, and the scales of its keys and values; powers of two, which round nothing.
FP8 = [(torch.float8_e4m3fn, 0.5, 2.0), (torch.float8_e5m2, 2.0, 0.25)]
# What no device may take, by argument: a kernel would read or write beside it.
MISFITS = [
    ("q", lambda q: q[0]),
    ("q", lambda q: q[:0]),
    ("q", lambda q: q.transpose(0, 1).contiguous().transpose(0, 1)),
    ("k_cache", lambda k: k[:, 0]),
    ("kv_indices", lambda slots: slots[:1]),
    ("kv_indices", lambda slots: slots.long()),
    ("kv_indices", lambda slots: slots[:, :0]),
    ("seq_lens", lambda lengths: lengths[:1]),
    ("codes", lambda codes: codes.long()),
    ("codes", lambda codes: codes[:3]),
    ("norms", lambda norms: norms.int()),
    ("norms", lambda norms: norms[..., :1]),
    ("valid", lambda valid: valid[:3]),
    ("mean", lambda mean: mean.half()),
    ("mean", lambda mean: mean[:1]),
    ("query_basis", lambda basis: basis.double()),
    ("steps", lambda steps: steps.double()),
    ("steps", lambda steps: steps[:1]),
    ("fields", lambda fields: fields.long()),
    ("fields", lambda fields: fields[:, :8].contiguous()),
    ("params", lambda params: params[:-1]),
    ("params", lambda params: params.double()),
    ("covered", lambda covered: covered.long()),
    ("error_edges", lambda edges: edges.double()),
    ("out", lambda out: out[:1]),
    ("out", lambda out: out.double()),
    ("stats", lambda stats: stats[..., :5].contiguous()),
    ("stats", lambda stats: stats.double()),
    ("counters", lambda counters: counters.float()),
    ("counter_offsets", lambda offsets: offsets[:5]),
    ("counter_offsets", lambda offsets: [*offsets[:-1], WIDTH - 4]),
    ("counter_offsets", lambda offsets: [-1, *offsets[1:]]),
]
# Settings that no device may take.
WRONG_SETTINGS = [
    ("sink", -1), ("window", -5), ("window", 1 << 31), ("pilot", 0.0), ("pilot_min", 3), ("cap", 0.0),
    ("cap", float("nan")), ("floor", -0.1), ("audit_rate", 2.0), ("sm_scale", float("nan")), ("k_scale", 0.0),
]  # fmt: skip
# The same of other selectors, and what the message names.
SELECTOR_MISFITS = [
    ("sign", "codes", lambda codes: codes[:3], "codes"),
    ("hash", "codes", lambda codes: codes[:, :1], "codes"),
    ("sign", "norms", lambda norms: norms[:3], "norms"),
    ("sign", "valid", lambda valid: valid.repeat_interleave(2)[::2], "valid"),
    ("hash", "steps", lambda line: line[:, :2].contiguous(), "steps"),
    ("hash", "query_basis", lambda nets: nets.double(), "query_basis"),
    ("hash", "fields", lambda widths: widths.long(), "fields"),
    ("quest", "codes", lambda bounds: bounds[:, :1], "page bounds"),
    ("quest", "codes", lambda bounds: bounds[..., :32].contiguous(), "page bounds"),
    ("quest", "valid", lambda valid: valid[:3], "valid"),
]
# The same of the encoders.
ENCODER_MISFITS = [
    ("sketch", "mean", lambda mean: mean[:1], "mean"),
    ("sketch", "key_basis", lambda basis: basis[..., :32].contiguous(), "key_basis"),
    ("sketch", "steps", lambda steps: steps[:1], "steps"),
    ("sketch", "fields", lambda fields: fields[:, :8].contiguous(), "fields"),
    ("sketch", "codes", lambda codes: codes[:3], "codes"),
    ("sketch", "norms", lambda norms: norms[..., :1], "norms"),
    ("sketch", "valid", lambda valid: valid.repeat_interleave(2)[::2], "valid"),
    ("sign", "mean", lambda mean: mean[:1], "mean"),
    ("sign", "codes", lambda codes: codes[:3], "codes"),
    ("sign", "widths", lambda widths: widths.long(), "widths"),
    ("hash", "norms", lambda norms: norms.int(), "norms"),
    ("hash", "valid", lambda valid: valid[:3], "valid"),
    ("quest", "bounds", lambda bounds: bounds[:, :1], "page bounds"),
    ("quest", "norms", lambda norms: norms.repeat(1, 1, 2), "norms"),
    ("quest", "valid", lambda valid: valid.bool(), "valid"),
]


def changed(op: str, arguments: tuple[Any, ...], changes: dict[str, Callable[[Any], Any]]) -> list[Any]:
    """Positional arguments of an op of which the named ones are changed."""
    names = [argument.name for argument in getattr(torch.ops.vattn, op).default._schema.arguments]
    return [changes.get(name, lambda value: value)(value) for name, value in zip(names, arguments, strict=False)]


SINK, WINDOW = 16, 64


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Distance of vectors in the last dimension, over the length of the true one."""
    return (x - truth).norm(dim=-1) / truth.norm(dim=-1)


@dataclass
class DecodeCase:
    """One call of the op: a paged cache in random slot order with heavy-tailed scores, and its settings."""

    batch: int = 2
    context: int = 1000
    num_qo_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    seed: int = 0
    epsilon: float = 0.1
    delta: float = 0.05
    bits: int = 64
    lanes: bool = False
    covered: int = UNLIMITED
    value_mean: float = 1.0
    score_scale: float = 2.0
    chosen_bound: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        slots = self.batch * self.context + 7
        shape = (slots, self.num_kv_heads, self.head_dim)
        spread = torch.logspace(0.5, -1.0, self.head_dim)
        self.k_cache = (torch.randn(shape, generator=g) * spread).to(self.dtype)
        if self.settings.get("selector") == "quest":
            # Page bounds presume that neighbours are alike.
            shared = torch.randn(pages.num_pages(slots), *shape[1:], generator=g) * spread
            self.k_cache = (0.4 * self.k_cache + 0.9 * shared.repeat_interleave(pages.PAGE, 0)[:slots]).to(self.dtype)
        self.v_cache = (torch.randn(shape, generator=g) + self.value_mean).to(self.dtype)
        q = torch.randn(self.batch, self.num_qo_heads, self.head_dim, generator=g)
        self.q = (q * self.score_scale / spread.norm() * self.head_dim**0.5).to(self.dtype)
        order = torch.randperm(slots, generator=g)[: self.batch * self.context]
        self.kv_indices = order.view(self.batch, self.context).to(torch.int32).contiguous()
        self.seq_lens = torch.full((self.batch,), self.context, dtype=torch.int64)
        self.side: tuple[torch.Tensor | None, ...] = (None,) * 7
        self.step = {
            "sm_scale": self.head_dim**-0.5,
            "layer_id": 3,
            "seed": self.seed,
            "sampler": "proportional",
            "target": "output",
            "selector": "oracle",
            "sink": SINK,
            "window": WINDOW,
            "dense_below": 0,
            "top_k_count": -1,
            "top_k_share": 0.025,
            "pilot": 0.02,
            "pilot_min": 32,
            "cap": 1.0,
            "floor": 0.05,
            "audit_rate": 0.0,
        } | self.settings
        self.index()

    @property
    def bound(self) -> str:
        """The chosen bound, or the default one of the sampler and target."""
        return self.chosen_bound or quantiles.default_bound(self.step["sampler"], self.step["target"])

    def index(self) -> None:
        """Make the side data of the case's selector from its keys and values as they are now."""
        make = {"sketch": self.sketched, "quest": self.paged, "sign": self.signed, "hash": self.hashed}
        if self.step["selector"] in make:
            self.side = make[self.step["selector"]]()

    def plant_wild_keys(self) -> None:
        """Three keys orthogonal to the queries, so of no weight, but ten times as long as what the codes reach."""
        draw = torch.Generator().manual_seed(0)
        middle = self.context // 2
        for request, slots in enumerate(self.kv_indices[:, middle : middle + 3].long()):
            for head, queries in enumerate(self.q[request].unflatten(0, (self.num_kv_heads, -1))):
                wild = 40 * torch.randn(3, self.head_dim, generator=draw)
                basis = torch.linalg.qr(queries.T).Q
                self.k_cache[slots, head] = wild - wild @ basis @ basis.T
        ops.encode(*self.encode_arguments)

    def moments(self) -> sketch.Moments:
        """Of one layer, from the case's own queries and keys."""
        moments = sketch.Moments.zeros(1, self.num_kv_heads, self.head_dim, "cpu")
        moments.add(0, self.q, self.k_cache)
        return moments

    def calibrate(self) -> sketch.SketchTables:
        """Tables of one layer from the case's own queries and keys."""
        return sketch.solve(self.moments(), self.k_cache[None, :512], self.bits, self.lanes)

    def calibrate_line(self, features: line.Features) -> line.LineTables:
        """Line of one layer from the case's own queries and keys."""
        sample = self.k_cache[torch.arange(512) % self.k_cache.shape[0]]
        return line.solve(self.moments(), self.q[None], sample[None], self.step["sm_scale"], features)

    def empty(self, norm_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms and valid bytes before anything is encoded."""
        slots = self.k_cache.shape[0]
        norms = torch.zeros(slots, self.num_kv_heads, norm_bytes, dtype=torch.uint8)
        return norms, torch.zeros(slots, dtype=torch.uint8)

    def paged(self) -> tuple[torch.Tensor | None, ...]:
        """Page bounds of every slot, as the op takes them."""
        shape = (pages.num_pages(self.k_cache.shape[0]), self.num_kv_heads, 2, self.head_dim)
        bounds = torch.full(shape, float("nan"), dtype=self.dtype)
        scale = self.step["sm_scale"]
        tables = self.calibrate_line(lambda layer, head, q, k, mean: pages.sample_features(q, k, mean, scale))
        self.encode_arguments = (self.k_cache, self.v_cache, torch.arange(self.k_cache.shape[0]), bounds)
        self.encode_arguments += self.empty(1)
        ops.encode_pages(*self.encode_arguments)
        return *self.encode_arguments[-3:], tables.mean[0], None, tables.line[0], None

    def signed(self) -> tuple[torch.Tensor | None, ...]:
        """Random-hyperplane signatures of every slot, as the op takes them."""
        nets, widths = signature.random_nets(0, self.head_dim, self.bits, self.num_qo_heads)
        return self.signatures(nets, nets[: self.num_kv_heads].clone(), widths, angular=True)

    def hashed(self) -> tuple[torch.Tensor | None, ...]:
        """Signatures by nets of two layers, one for each query head, as the op takes them."""
        g, hidden, heads = torch.Generator().manual_seed(1), 48, self.num_qo_heads
        first = torch.randn(1, self.head_dim, hidden, generator=g).expand(heads, -1, -1)
        second = torch.randn(1, hidden, self.bits, generator=g) + 0.1 * torch.randn(heads, 1, self.bits, generator=g)
        bias = [0.1 * torch.randn(heads, n, generator=g) for n in (hidden, self.bits)]
        nets, widths = signature.pack([first, second], bias)
        return self.signatures(nets, nets.clone(), widths, angular=False)

    def signatures(
        self, query_nets: torch.Tensor, key_nets: torch.Tensor, widths: torch.Tensor, angular: bool
    ) -> tuple[torch.Tensor, ...]:
        """Signatures by given nets, and the line that weighs them."""
        slots, per_head = self.k_cache.shape[0], key_nets.shape[0] // self.num_kv_heads
        group, sizes = self.num_qo_heads // self.num_kv_heads, widths.tolist()

        def features(layer, head, q, k, mean):  # type: ignore[no-untyped-def]
            nets = query_nets[head * group : (head + 1) * group], key_nets[head * per_head : (head + 1) * per_head]
            return signature.sample_features(q, k, mean, *nets, sizes, sizes, angular, self.step["sm_scale"])

        tables = self.calibrate_line(features)
        codes = torch.zeros(slots, self.num_kv_heads, per_head * sizes[-1] // 32, dtype=torch.int32)
        self.encode_arguments = (self.k_cache, torch.arange(slots), tables.mean[0], key_nets, widths)
        self.encode_arguments += (codes, *self.empty(1), angular)
        ops.encode_signature(*self.encode_arguments)
        return *self.encode_arguments[-4:-1], tables.mean[0], query_nets, tables.line[0], widths

    def sketched(self) -> tuple[torch.Tensor, ...]:
        """Side data of every slot and the tables that made them, as the op takes them."""
        tables = self.calibrate()
        slots = self.k_cache.shape[0]
        codes = torch.zeros(slots, self.num_kv_heads, self.bits // 32, dtype=torch.int32)
        norms = torch.zeros(slots, self.num_kv_heads, 2, dtype=torch.uint8)
        valid = torch.zeros(slots, dtype=torch.uint8)
        self.encode_arguments = (self.k_cache, self.v_cache, torch.arange(slots), tables.mean[0], tables.key_basis[0])
        self.encode_arguments += (tables.steps[0], tables.fields[0], codes, norms, valid)
        ops.encode(*self.encode_arguments)
        return codes, norms, valid, tables.mean[0], tables.query_basis[0], tables.steps[0], tables.fields[0]

    def estimated(self, request: int, head: int, slots: torch.Tensor) -> torch.Tensor:
        """Logits that the reference estimates of a KV head's slots, selectors other than ``sketch``."""
        group = self.num_qo_heads // self.num_kv_heads
        rows, scale = slice(head * group, (head + 1) * group), self.step["sm_scale"]
        q = self.q[request, rows].double().cpu()
        if self.step["selector"] == "oracle":
            return scale * q @ self.k_cache[slots, head].double().cpu().T
        codes, norms, _, mean, nets, weights, widths = (None if t is None else t.cpu() for t in self.side)
        if self.step["selector"] == "quest":
            return reference_quest.logits(q, codes[slots // pages.PAGE, head], mean[head], weights[head], scale)
        side = codes[slots, head], norms[slots, head], mean[head], nets[rows], weights[head], widths
        return reference_signature.logits(q, *side, self.step["selector"] == "sign", scale)

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments with fresh, NaN-poisoned outputs."""
        out = torch.full_like(self.q, float("nan"))
        stats = torch.full((self.batch, self.num_qo_heads, len(ops.STATS)), float("nan"))
        counters = torch.zeros(WIDTH, dtype=torch.float64)
        row = torch.tensor(params.pack(self.epsilon, self.delta, self.bound))
        covered = torch.tensor([self.covered], dtype=torch.int32)
        read = (self.q, self.k_cache, self.v_cache, self.kv_indices, self.seq_lens, *self.side, row, covered)
        return (*read, BUDGET_EDGES, EDGES, EDGES, out, stats, counters, OFFSETS)

    def misfit(self, name: str, change: Callable[[Any], Any]) -> list[Any]:
        """Positional arguments of which the named one is changed."""
        return changed("decode", self.arguments(), {name: change})

    def encoder_misfit(self, name: str, change: Callable[[Any], Any]) -> list[Any]:
        """Positional arguments of the selector's encoder of which the named one is changed."""
        return changed(ENCODERS[self.step["selector"]], self.encode_arguments, {name: change})

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, stats and counters of one call."""
        arguments = self.arguments()
        ops.decode(*arguments, **self.step)
        return arguments[-4], arguments[-3], arguments[-2]

    def exact(self) -> torch.Tensor:
        """Dense attention in float64, ``[batch, num_qo_heads, head_dim]``."""
        group = self.num_qo_heads // self.num_kv_heads
        rows = []
        for b, length in enumerate(self.seq_lens.tolist()):
            slots = self.kv_indices[b, :length].long()
            k = self.k_cache[slots].double().repeat_interleave(group, 1)
            v = self.v_cache[slots].double().repeat_interleave(group, 1)
            p = torch.softmax(torch.einsum("hd,nhd->hn", self.q[b].double(), k) * self.step["sm_scale"], -1)
            rows.append(torch.einsum("hn,nhd->hd", p, v))
        return torch.stack(rows)

    def errors(self, out: torch.Tensor) -> torch.Tensor:
        """Relative error of every head, float64 ``[batch, num_qo_heads]``."""
        return relative_error(out.double(), self.exact())
