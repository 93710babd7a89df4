"""Side data of every selector over captured keys and values: one small adapter a selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from vattn_kernels import ops
from vattn_kernels.reference import sketch as reference
from vattn_kernels.sketch import WORD_BITS, Moments, SketchTables, solve
from vattn_sgl.eval.capture import Captured, Geometry, observe, rope
from vattn_sgl.selectors.base import SideArguments
from vattn_sgl.selectors.calibration import LEAST_SPAN, even_sample, spread_positions

NO_SIDE: SideArguments = (None,) * 7


class Adapter(Protocol):
    """A selector's side data over one captured text.

    Attributes
    ----------
    name : str
        The op's argument ``selector``.
    bits : int
        Bits of a token's code per KV head; 0 where there is none.
    """

    name: str
    bits: int

    def attach(self, captured: Captured) -> None:
        """Code the keys of a text."""
        ...

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Code slots again whose K and V have changed."""
        ...

    def arguments(self, layer: int) -> SideArguments:
        """The op's seven side-data arguments of one layer."""
        ...

    def logits(self, layer: int, head: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Estimated logits, coding variance included, float64 ``[m, n]`` of queries ``[m, head_dim]``."""
        ...


class Oracle:
    """Exact scores."""

    name, bits = "oracle", 0

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def attach(self, captured: Captured) -> None:
        """Keep the keys."""
        self.keys = captured.k

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Nothing to code."""

    def arguments(self, layer: int) -> SideArguments:
        """No side data."""
        return NO_SIDE

    def logits(self, layer: int, head: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Exact logits."""
        return self.geometry.sm_scale * q.double() @ self.keys[layer, slots, head].double().T


class Sketch:
    """Codes of a given size, with tables calibrated beforehand."""

    name = "sketch"

    def __init__(self, geometry: Geometry, bits: int, tables: SketchTables) -> None:
        self.geometry, self.bits, self.tables = geometry, bits, tables

    def attach(self, captured: Captured) -> None:
        """Code every slot."""
        layers, slots, heads, _ = captured.k.shape
        self.captured = captured
        self.codes = torch.zeros(layers, slots, heads, self.bits // WORD_BITS, dtype=torch.int32)
        self.norms = torch.zeros(layers, slots, heads, 2, dtype=torch.uint8)
        self.valid = torch.zeros(layers, slots, dtype=torch.uint8)
        for layer in range(layers):
            self.write(layer, torch.arange(captured.tokens.numel()))

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Code slots."""
        t = self.tables
        rows = (t.mean[layer], t.key_basis[layer], t.steps[layer], t.fields[layer])
        side = (self.codes[layer], self.norms[layer], self.valid[layer])
        ops.encode(self.captured.k[layer], self.captured.v[layer], slots, *rows, *side)

    def arguments(self, layer: int) -> SideArguments:
        """Codes, norms, valid bits and the tables that made them."""
        t, side = self.tables, (self.codes[layer], self.norms[layer], self.valid[layer])
        return (*side, t.mean[layer], t.query_basis[layer], t.steps[layer], t.fields[layer])

    def logits(self, layer: int, head: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Estimated logits plus half the variance of what the code misses."""
        t = self.tables
        rows = (t.mean[layer, head], t.query_basis[layer, head], t.steps[layer, head], t.fields[layer, head])
        side = (self.codes[layer, slots, head], self.norms[layer, slots, head])
        estimate, variance = reference.logits(q.double(), *side, *rows, self.geometry.sm_scale)
        return estimate + variance / 2


class Calibrator:
    """Moments of a calibration text, moved to every position as a server does; tables of any size come from them."""

    def __init__(self, model: Any, geometry: Geometry, tokens: list[int]) -> None:
        self.geometry, self.length = geometry, len(tokens)
        self.rope = rope(model, max(LEAST_SPAN, len(tokens)))
        self.moments = Moments.zeros(geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, "cpu")
        here, chosen = torch.arange(len(tokens)), even_sample(torch.arange(len(tokens)))
        elsewhere = spread_positions(chosen.numel(), self.rope.num_positions)
        self.sample = torch.empty(geometry.num_layers, chosen.numel(), geometry.num_kv_heads, geometry.head_dim)

        def see(layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
            k = self.rope.unrotate(k, here)
            self.moments.add(layer, self.rope.unrotate(q, here), k)
            self.sample[layer] = self.rope.rotate(k[chosen], elsewhere)

        observe(model, tokens, see)

    def tables(self, bits: int) -> SketchTables:
        """Tables of codes of ``bits`` bits."""
        return solve(self.moments.at_positions(self.rope, self.rope.num_positions), self.sample, bits)


Build = Callable[[Geometry, Calibrator, int], Adapter]
# A selector of the op without an entry here is left out of the evaluation and named in its report.
ADAPTERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "oracle": (lambda geometry, calibrator, bits: Oracle(geometry), (0,)),
    "sketch": (lambda geometry, calibrator, bits: Sketch(geometry, bits, calibrator.tables(bits)), (64, 128)),
}


def adapters(geometry: Geometry, calibrator: Calibrator) -> list[Adapter]:
    """One adapter per selector of the op and code size.

    Parameters
    ----------
    geometry : Geometry
        Of the model.
    calibrator : Calibrator
        Its calibration.
    """
    return [
        build(geometry, calibrator, bits)
        for name, (build, sizes) in ADAPTERS.items()
        if name in ops.SELECTORS
        for bits in sizes
    ]


def missing() -> list[str]:
    """Selectors of the op that have no adapter."""
    return [name for name in ops.SELECTORS if name not in ADAPTERS]
