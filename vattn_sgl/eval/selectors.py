"""Side data of every selector over captured keys and values: one small adapter a selector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from vattn_kernels import dimensions, line, ops, pages, signature
from vattn_kernels.reference import quest
from vattn_kernels.reference import signature as signatures
from vattn_kernels.reference import sketch as reference
from vattn_kernels.sketch import WORD_BITS, Moments, SketchTables, solve
from vattn_sgl.eval.capture import Captured, Geometry, observe, rope
from vattn_sgl.selectors import hash_weights
from vattn_sgl.selectors.base import CacheGeometry, SideArguments
from vattn_sgl.selectors.calibration import LEAST_SPAN, SAMPLE_QUERIES, even_sample, spread_positions
from vattn_sgl.selectors.hash_weights import Nets
from vattn_sgl.selectors.sign import PROJECTION_SEED
from vattn_sgl.selectors.signatures import fit_line

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

    @property
    def dimensions(self) -> Sequence[float]:
        """Effective dimensions of each layer's values, as calibration learns them."""
        ...

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
        """Estimated logits, coding variance included, float64 ``[m, n]``.

        Queries are ``[m, head_dim]``, those of the KV head's whole group one after another.
        """
        ...


class Oracle:
    """Exact scores; nothing is calibrated."""

    name, bits = "oracle", 0

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.dimensions = [dimensions.MOST] * geometry.num_layers

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


class Coded:
    """What adapters with side data share; a subclass says how large a code is, and codes."""

    codes: torch.Tensor
    norm_bytes = 2

    def __init__(self, geometry: Geometry, dims: Sequence[float]) -> None:
        self.geometry, self.dimensions = geometry, dims

    def attach(self, captured: Captured) -> None:
        """Code every slot."""
        layers, slots, heads, _ = captured.k.shape
        self.captured = captured
        self.codes = self.empty(captured)
        self.norms = torch.zeros(layers, slots, heads, self.norm_bytes, dtype=torch.uint8)
        self.valid = torch.zeros(layers, slots, dtype=torch.uint8)
        for layer in range(layers):
            self.write(layer, torch.arange(captured.tokens.numel()))

    def empty(self, captured: Captured) -> torch.Tensor:
        """Codes before anything is coded."""
        raise NotImplementedError

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Code slots."""
        raise NotImplementedError

    def side(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, norms and valid bits."""
        return self.codes[layer], self.norms[layer], self.valid[layer]


class Sketch(Coded):
    """Codes of a given size, with tables calibrated beforehand."""

    name = "sketch"

    def __init__(self, geometry: Geometry, dims: Sequence[float], bits: int, tables: SketchTables) -> None:
        super().__init__(geometry, dims)
        self.bits, self.tables = bits, tables

    def empty(self, captured: Captured) -> torch.Tensor:
        """Words of codes."""
        return torch.zeros(*captured.k.shape[:3], self.bits // WORD_BITS, dtype=torch.int32)

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Code slots."""
        t = self.tables
        rows = (t.mean[layer], t.key_basis[layer], t.steps[layer], t.fields[layer])
        ops.encode(self.captured.k[layer], self.captured.v[layer], slots, *rows, *self.side(layer))

    def arguments(self, layer: int) -> SideArguments:
        """Codes, norms, valid bits and the tables that made them."""
        t = self.tables
        return (*self.side(layer), t.mean[layer], t.query_basis[layer], t.steps[layer], t.fields[layer])

    def logits(self, layer: int, head: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Estimated logits plus half the variance of what the code misses."""
        t = self.tables
        rows = (t.mean[layer, head], t.query_basis[layer, head], t.steps[layer, head], t.fields[layer, head])
        side = (self.codes[layer, slots, head], self.norms[layer, slots, head])
        estimate, variance = reference.logits(q.double(), *side, *rows, self.geometry.sm_scale)
        return estimate + variance / 2


class Quest(Coded):
    """Page bounds in the cache's dtype, float32 here; a request's slots lie one after another, which suits them."""

    name, norm_bytes = "quest", 1

    def __init__(self, geometry: Geometry, dims: Sequence[float], tables: line.LineTables) -> None:
        super().__init__(geometry, dims)
        self.tables = tables
        self.bits = 2 * geometry.head_dim * 32 // pages.PAGE

    def empty(self, captured: Captured) -> torch.Tensor:
        """Least and greatest keys of pages."""
        layers, slots, heads, head_dim = captured.k.shape
        return torch.zeros(layers, pages.num_pages(slots), heads, 2, head_dim)

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Bound the pages of slots."""
        ops.encode_pages(self.captured.k[layer], self.captured.v[layer], slots, *self.side(layer))

    def arguments(self, layer: int) -> SideArguments:
        """Bounds, norms, valid bits and the line."""
        return (*self.side(layer), self.tables.mean[layer], None, self.tables.line[layer], None)

    def logits(self, layer: int, head: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The line's logits of each slot's page."""
        t, bounds = self.tables, self.codes[layer, slots // pages.PAGE, head]
        return quest.logits(q.double(), bounds, t.mean[layer, head], t.line[layer, head], self.geometry.sm_scale)


class Signatures(Coded):
    """Signs of nets: random hyperplanes (``sign``), or learned for the model (``hash``)."""

    norm_bytes = 1

    def __init__(
        self, name: str, geometry: Geometry, dims: Sequence[float], nets: list[Nets], tables: line.LineTables
    ) -> None:
        super().__init__(geometry, dims)
        self.name, self.nets, self.tables = name, nets, tables
        self.angular = name == "sign"
        self.words = nets[0].bits // WORD_BITS
        # Signatures of a key: one, or one a query head of its group.
        self.each = nets[0].key.shape[0] // geometry.num_kv_heads
        self.bits = self.each * nets[0].bits

    def empty(self, captured: Captured) -> torch.Tensor:
        """Words of signatures."""
        return torch.zeros(*captured.k.shape[:3], self.each * self.words, dtype=torch.int32)

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Sign slots."""
        nets, mean = self.nets[layer], self.tables.mean[layer]
        k = self.captured.k[layer]
        ops.encode_signature(k, slots, mean, nets.key, nets.key_widths, *self.side(layer), self.angular)

    def arguments(self, layer: int) -> SideArguments:
        """Signatures, norms, valid bits, the queries' nets and the line."""
        nets, t = self.nets[layer], self.tables
        return (*self.side(layer), t.mean[layer], nets.query, t.line[layer], nets.query_widths)

    def logits(self, layer: int, head: int, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The line's logits of each signature."""
        nets, t, group = self.nets[layer], self.tables, self.geometry.group
        codes, norms = self.codes[layer, slots, head], self.norms[layer, slots, head]
        found = torch.empty(q.shape[0], slots.numel(), dtype=torch.float64)
        for g in range(group):
            own = q[g::group].double()
            first = g % self.each * self.words
            query = nets.query[head * group + g].expand(own.shape[0], -1)
            found[g::group] = signatures.logits(
                own, codes[:, first : first + self.words], norms, t.mean[layer, head], query, t.line[layer, head],
                nets.query_widths, self.angular, self.geometry.sm_scale,
            )  # fmt: skip
        return found


class Calibrator:
    """Moments and samples of a calibration text, from which tables of any size and selector are solved.

    The sketch's are moved to every position, as a server does; the lines are fitted where the text stood.
    """

    def __init__(self, model: Any, geometry: Geometry, tokens: list[int]) -> None:
        g, self.geometry, self.length = geometry, geometry, len(tokens)
        self.rope = rope(model, max(LEAST_SPAN, len(tokens)))
        self.unrotated, self.moments = (
            Moments.zeros(g.num_layers, g.num_kv_heads, g.head_dim, "cpu") for _ in range(2)
        )
        here, chosen = torch.arange(len(tokens)), even_sample(torch.arange(len(tokens)))
        elsewhere = spread_positions(chosen.numel(), self.rope.num_positions)
        # Past the sinks, as in `vattn_sgl.selectors.quest`.
        starts = torch.linspace(1, len(tokens) // pages.PAGE - 1, chosen.numel() // pages.PAGE).long() * pages.PAGE
        runs = (starts[:, None] + torch.arange(pages.PAGE)).flatten()
        # As in `vattn_sgl.selectors.calibration`: the last quarter looks back on most of the keys.
        late = torch.linspace(3 * len(tokens) // 4, len(tokens) - 1, min(SAMPLE_QUERIES, len(tokens) // 4)).long()
        self.moved, self.sample, self.paged = (
            torch.empty(g.num_layers, rows.numel(), g.num_kv_heads, g.head_dim) for rows in (chosen, chosen, runs)
        )
        self.queries = torch.empty(g.num_layers, late.numel(), g.num_qo_heads, g.head_dim)
        self.dimensions = [0.0] * g.num_layers

        def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
            self.dimensions[layer] = dimensions.effective(v[chosen])
            self.moments.add(layer, q, k)
            self.sample[layer], self.paged[layer], self.queries[layer] = k[chosen], k[runs], q[late]
            before = self.rope.unrotate(k, here)
            self.unrotated.add(layer, self.rope.unrotate(q, here), before)
            self.moved[layer] = self.rope.rotate(before[chosen], elsewhere)

        observe(model, tokens, see)

    def tables(self, bits: int) -> SketchTables:
        """Tables of codes of ``bits`` bits."""
        return solve(self.unrotated.at_positions(self.rope, self.rope.num_positions), self.moved, bits)

    def page_line(self) -> line.LineTables:
        """Line of page bounds."""
        scale = self.geometry.sm_scale
        return line.solve(
            self.moments,
            self.queries,
            self.paged,
            scale,
            lambda layer, head, q, k, mean: pages.sample_features(q, k, mean, scale),
        )

    def signature_line(self, nets: list[Nets], angular: bool) -> line.LineTables:
        """Line of the signatures of given nets."""
        return fit_line(nets, angular, self.geometry.sm_scale, self.moments, self.queries, self.sample)


def _sign(geometry: Geometry, calibrator: Calibrator, bits: int) -> Adapter:
    g = geometry
    query, widths = signature.random_nets(PROJECTION_SEED, g.head_dim, bits, g.num_qo_heads)
    nets = [Nets(query, query[: g.num_kv_heads].clone(), widths, widths)] * g.num_layers
    return Signatures("sign", g, calibrator.dimensions, nets, calibrator.signature_line(nets, angular=True))


def _hash(geometry: Geometry, calibrator: Calibrator, weights: str) -> Adapter:
    nets = load_nets(geometry, weights)
    return Signatures("hash", geometry, calibrator.dimensions, nets, calibrator.signature_line(nets, angular=False))


def load_nets(geometry: Geometry, weights: str) -> list[Nets]:
    """HashAttention's nets of every layer.

    Parameters
    ----------
    geometry : Geometry
        Of the model.
    weights : str
        File of weights, see `vattn_sgl.selectors.hash_weights`.

    Raises
    ------
    vattn_sgl.config.ConfigError
        If the file cannot be read or does not fit the model.
    """
    g = geometry
    pool = CacheGeometry(g.num_layers, 1, g.num_kv_heads, g.head_dim, torch.device("cpu"), num_qo_heads=g.num_qo_heads)
    return hash_weights.nets(hash_weights.load(weights), weights, pool, range(g.num_layers))


Build = Callable[[Geometry, Calibrator, int], Adapter]
# A selector of the op without an entry here is left out of the evaluation and named in its report.
ADAPTERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "oracle": (lambda geometry, calibrator, bits: Oracle(geometry), (0,)),
    "sketch": (lambda geometry, c, bits: Sketch(geometry, c.dimensions, bits, c.tables(bits)), (64, 128)),
    "quest": (lambda geometry, c, bits: Quest(geometry, c.dimensions, c.page_line()), (0,)),
    "sign": (_sign, (64,)),
}


def adapters(geometry: Geometry, calibrator: Calibrator, weights: str | None = None) -> list[Adapter]:
    """One adapter per selector of the op and code size; ``hash`` only with weights.

    Parameters
    ----------
    geometry : Geometry
        Of the model.
    calibrator : Calibrator
        Its calibration.
    weights : str, optional
        File of HashAttention's weights for this model.
    """
    made = [
        build(geometry, calibrator, bits)
        for name, (build, sizes) in ADAPTERS.items()
        if name in ops.SELECTORS
        for bits in sizes
    ]
    return made if weights is None else [*made, _hash(geometry, calibrator, weights)]


def missing(weights: str | None = None) -> list[str]:
    """Selectors of the op that are left out, each with the reason."""
    reasons = {name: "it has no adapter" for name in ops.SELECTORS if name not in ADAPTERS}
    if weights is None:
        reasons["hash"] = "no weights of this model were given"
    else:
        reasons.pop("hash")
    return [f"`{name}` ({why})" for name, why in reasons.items()]
