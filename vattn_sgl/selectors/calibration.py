"""Calibration of a selector from the traffic itself: when to observe, when to solve, where the result is kept."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vattn_kernels import dimensions
from vattn_kernels.cache import cache_dir
from vattn_kernels.rope import Rope, is_same
from vattn_kernels.sketch import Moments, SketchTables, check_fields, solve
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry

logger = logging.getLogger(__name__)

# Without a known rotation a basis serves a little beyond the longest position it has seen: on SmolLM2-135M 17 % beyond
# cost half as many reads again and took violations of binding heads from 2.9 to 4.4 %. So contexts that grow are
# observed early.
COVERAGE_SLACK = 1.125
GROWTH = 1.0625
LEAST_NEW_TOKENS = 64
# With a known rotation moments are moved to every position of a span, and doubled tokens sharpen them: at 8,192 tokens
# of context, epsilon .05, 2,048 observed tokens read 9 % more than 8,192.
LEAST_SPAN = 8192
ENOUGH_TOKENS = 16384
SAMPLE_TOKENS = 1024
SAMPLE_QUERIES = 32
_MOMENTS = ("qq", "kk", "k", "q_count", "k_count")
_META = ("longest", "covered", "tokens")
_ROPE = "rope.sample"
_DIMENSIONS = "values.dimensions"
# Positions are int32 in the kernels.
MOST_POSITIONS = 2**30


class Tables(Protocol):
    """A dataclass of tensors stacked over layers, `SketchTables` or `LineTables`."""

    def to(self, device: torch.device | str) -> Self:
        """Copy on another device."""
        ...


class Kept(NamedTuple):
    """What a store keeps.

    Attributes
    ----------
    tables : SketchTables or LineTables
        The selector's.
    moments : Moments
        What they were made from.
    dimensions : torch.Tensor
        float32 ``[num_layers]``, effective dimensions of each layer's values.
    rope : torch.Tensor
        Sample of the rotation; empty where it is not known.
    meta : dict
        ``{"longest", "covered", "tokens"}``.
    """

    tables: Any
    moments: Moments
    dimensions: torch.Tensor
    rope: torch.Tensor
    meta: dict[str, int]

    def named(self) -> dict[str, torch.Tensor]:
        """Tensors of a file by name."""
        named = _named(self.tables, self.moments)
        return named | {_DIMENSIONS: self.dimensions, _ROPE: self.rope}


class Solver(Protocol):
    """Turns what was observed into a selector's tables."""

    def __call__(self, moments: Moments, keys: torch.Tensor, queries: torch.Tensor) -> Any:
        """Tables from moments and samples ``[num_layers, n, heads, head_dim]`` of keys and queries."""
        ...


def even_sample(slots: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLE_TOKENS` slots, evenly spread."""
    count = min(SAMPLE_TOKENS, slots.numel())
    return slots[torch.linspace(0, slots.numel() - 1, count, device=slots.device).long()]


def spread_positions(count: int, span: int) -> torch.Tensor:
    """``count`` positions below ``span``, evenly spread and in no order; int64."""
    golden = (5**0.5 - 1) / 2
    return ((torch.arange(count, dtype=torch.float64) * golden % 1) * span).long()


def model_key(model_path: str) -> str:
    """Fingerprint of a model folder: its configuration and the size and time of its weight files.

    Parameters
    ----------
    model_path : str
        Folder or hub name.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(os.path.basename(os.path.normpath(model_path)).encode())
    folder = Path(model_path)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.name == "config.json":
                digest.update(file.read_bytes())
            elif file.suffix in (".safetensors", ".bin", ".gguf"):
                stat = file.stat()
                digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class CalibrationStore:
    """Where the calibration of one model and geometry is kept between starts.

    Attributes
    ----------
    path : pathlib.Path
        ``<cache>/calibration/<model>-<geometry>-<bits>.safetensors``.

    Parameters
    ----------
    key : str
        From `model_key`, with whatever else the tables depend on.
    geometry : CacheGeometry
        Of the pool.
    bits : int
        Of a token's code.
    tables : type
        `SketchTables` or `LineTables`.
    """

    def __init__(self, key: str, geometry: CacheGeometry, bits: int, tables: Any = SketchTables) -> None:
        name = f"{key}-L{geometry.num_layers}-H{geometry.num_kv_heads}-D{geometry.head_dim}-b{bits}.safetensors"
        self.path = cache_dir() / "calibration" / name
        self.tables = tables
        self.names = [field.name for field in fields(tables)]
        self.bits, self.lanes = bits, geometry.lanes
        shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
        blank = SketchTables.zeros(*shape, bits, "meta") if tables is SketchTables else tables.zeros(*shape, "meta")
        self._like = _named(blank, Moments.zeros(*shape, "meta"))
        self._like[_DIMENSIONS] = torch.zeros(geometry.num_layers, device="meta")

    def load(self) -> Kept | None:
        """What was kept; None without a sound file."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = file.metadata()
                tensors = {name: file.get_tensor(name) for name in (*self._like, _ROPE)}
            meta = {name: int(stored[name]) for name in _META}
            self._check(tensors, meta, stored.get("sha256"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            logger.warning("vattention: calibration %s cannot be read (%s); calibrating again", self.path, error)
            return None
        tables = self.tables(*(tensors[f"tables.{name}"] for name in self.names))
        moments = Moments(*(tensors[f"moments.{name}"] for name in _MOMENTS))
        return Kept(tables, moments, tensors[_DIMENSIONS], tensors[_ROPE], meta)

    def save(self, kept: Kept) -> None:
        """Write by renaming, so that a half-written file is never seen; a full disk is logged, not raised."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.named().items()}
        metadata = {name: str(value) for name, value in kept.meta.items()} | {"sha256": _checksum(tensors, kept.meta)}
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata=metadata)
            draft.replace(self.path)
        except OSError as error:
            logger.warning("vattention: calibration could not be kept at %s (%s)", self.path, error)

    def _check(self, tensors: dict[str, torch.Tensor], meta: dict[str, int], checksum: str | None) -> None:
        """Raise a ValueError for whatever the kernels would trip over."""
        for name, like in self._like.items():
            tensor = tensors[name]
            if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                found, wanted = ((tuple(t.shape), t.dtype) for t in (tensor, like))
                raise ValueError(f"{name} is {found}, expected {wanted}")
        if checksum != _checksum(tensors, meta):
            raise ValueError("its checksum is missing or does not fit")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
        low, high = tensors[_DIMENSIONS].aminmax()
        if low < dimensions.LEAST or high > dimensions.MOST:
            raise ValueError(
                f"{_DIMENSIONS} reach from {low} to {high}, expected {dimensions.LEAST} to {dimensions.MOST}"
            )
        for name in ("longest", "covered"):
            if not 0 < meta[name] <= MOST_POSITIONS:
                raise ValueError(f"{name} is {meta[name]}, expected 1 to {MOST_POSITIONS}")
        if self.tables is SketchTables:
            check_fields(tensors["tables.fields"], self.bits, self.lanes)


def _named(tables: Any, moments: Moments) -> dict[str, torch.Tensor]:
    """Tensors of a file by name."""
    named = {f"tables.{field.name}": getattr(tables, field.name) for field in fields(tables)}
    return named | {f"moments.{name}": getattr(moments, name) for name in _MOMENTS}


def _checksum(tensors: dict[str, torch.Tensor], meta: dict[str, int]) -> str:
    digest = hashlib.sha256(repr([meta[name] for name in _META]).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


class Calibration:
    """Collects moments while they are needed and turns them into tables.

    Attributes
    ----------
    tables : SketchTables or LineTables or None
        None before the first calibration.
    longest : int
        Longest context that was observed or, with a known rotation, that the moments were moved to.
    observed_tokens : int
        Tokens in the moments.
    dimensions : tuple of float
        Effective dimensions of each layer's values; `vattn_kernels.dimensions.MOST` before the first calibration.

    Parameters
    ----------
    settings : Settings
        ``calibration_tokens``.
    geometry : CacheGeometry
        Of the pool.
    store : CalibrationStore
        Where the result is kept.
    solver : callable, optional
        Makes the tables; default the sketch's, which needs no sample of queries.
    rope : Rope, optional
        The model's rotation, for tables that are made from moments; None ties them to the positions observed.
    """

    def __init__(
        self,
        settings: Settings,
        geometry: CacheGeometry,
        store: CalibrationStore,
        solver: Solver | None = None,
        rope: Rope | None = None,
    ) -> None:
        self.needed = settings.calibration_tokens
        self.keeps_queries = solver is not None
        bits, lanes = settings.sketch_bits, geometry.lanes
        self.solver: Solver = solver or (lambda moments, keys, queries: solve(moments, keys, bits, lanes))
        self.geometry = geometry
        self.store = store
        self.rope = rope
        self._rope_sample = rope.sample() if rope is not None else torch.zeros(0)
        self.tables: Any = None
        self.dimensions = (dimensions.MOST,) * geometry.num_layers
        self.longest = 0
        self.observed_tokens = 0
        self.moments = Moments.zeros(geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.device)
        self._queries: list[torch.Tensor | None] = [None] * geometry.num_layers
        self._new_longest = 0
        self._new_tokens = 0
        loaded = store.load()
        if loaded is not None and not is_same(loaded.rope, self._rope_sample):
            logger.info("vattention: calibration %s is of another rotary embedding; calibrating again", store.path)
        elif loaded is not None:
            self.tables = loaded.tables.to(geometry.device)
            self.dimensions = tuple(loaded.dimensions.tolist())
            self.moments = Moments(*(getattr(loaded.moments, name).to(geometry.device) for name in _MOMENTS))
            self.longest, self.observed_tokens = loaded.meta["longest"], loaded.meta["tokens"]
            self._new_longest = self.longest

    @property
    def covered(self) -> int:
        """Longest context the tables may be used for, in tokens."""
        if self.tables is None:
            return 0
        return self.longest if self.rope is not None else int(self.longest * COVERAGE_SLACK)

    @property
    def _familiar(self) -> int:
        """Longest context that needs no new observation where the rotation is not known."""
        return int(self.longest * GROWTH)

    def wants(self, longest: int, num_tokens: int) -> bool:
        """Whether a pass shall be observed, and if so count it.

        Parameters
        ----------
        longest : int
            Longest context of the pass, in tokens.
        num_tokens : int
            Tokens that the pass computes.
        """
        if num_tokens == 0:
            return False
        if self.tables is not None:
            if self.rope is None:
                finished = longest <= self._familiar
            else:
                finished = self.observed_tokens >= ENOUGH_TOKENS or num_tokens < LEAST_NEW_TOKENS
            if finished:
                return False
        self._new_tokens += num_tokens
        self._new_longest = max(self._new_longest, longest)
        self.observed_tokens += num_tokens
        return True

    def observe(self, layer: int, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> None:
        """Add one layer's rows.

        Parameters
        ----------
        layer : int
            Index on this rank.
        q, k : torch.Tensor
            ``[T, num_qo_heads, head_dim]`` and ``[T, num_kv_heads, head_dim]``, after RoPE.
        positions : torch.Tensor
            int64 ``[T]``.
        """
        if self.rope is not None:
            q, k = self.rope.unrotate(q, positions), self.rope.unrotate(k, positions)
        self.moments.add(layer, q, k)
        if self.keeps_queries:
            # The last quarter of a pass looks back on most of the keys that are sampled with it.
            first, last = 3 * q.shape[0] // 4, q.shape[0] - 1
            rows = torch.linspace(first, last, min(SAMPLE_QUERIES, last - first + 1), device=q.device).long()
            old = self._queries[layer]
            new = q[rows].float()
            self._queries[layer] = (new if old is None else torch.cat([old, new]))[-SAMPLE_QUERIES:]

    def due(self, longest: int) -> bool:
        """Whether to solve before a pass over contexts of up to ``longest`` tokens."""
        if self.tables is None:
            return self._new_tokens >= self.needed
        if self.rope is None:
            return self._new_longest > self._familiar and self._new_tokens >= LEAST_NEW_TOKENS
        doubled = self._new_tokens >= self.observed_tokens - self._new_tokens
        return doubled or self._span(longest) > self.longest

    def solve(
        self,
        cached: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        choose: Callable[[torch.Tensor], torch.Tensor] = even_sample,
    ) -> None:
        """Make tables from the moments and keep them in the store.

        Parameters
        ----------
        cached : callable
            ``cached(layer, slots)`` reads K and V, each ``[num_samples, num_kv_heads, head_dim]``, from the pool.
        slots : torch.Tensor
            Slots that hold a token.
        positions : torch.Tensor
            ``[num_slots]``, position of each slot's key.
        longest : int
            Longest context of the coming pass, in tokens.
        choose : callable
            Picks from the slots the sample that the solver sees.
        """
        sample = choose(slots)
        keys, values = zip(*(cached(layer, sample) for layer in range(self.geometry.num_layers)), strict=True)
        stacked = torch.stack([k.float() for k in keys])
        self.dimensions = tuple(dimensions.effective(v) for v in values)
        kept = [queries for queries in self._queries if queries is not None]
        moments = self.moments
        if self.rope is not None:
            self.longest = max(self.longest, self._span(max(longest, self._new_longest)))
            moments = moments.at_positions(self.rope, self.longest)
            elsewhere = spread_positions(sample.numel(), self.longest).to(sample.device)
            stacked = self.rope.rotate(self.rope.unrotate(stacked, positions[sample].long()), elsewhere)
        else:
            self.longest = self._new_longest
        self.tables = self.solver(moments, stacked, torch.stack(kept) if kept else stacked[:, :0])
        self._new_tokens = 0
        meta = {"longest": self.longest, "covered": self.covered, "tokens": self.observed_tokens}
        dims = torch.tensor(self.dimensions, dtype=torch.float32)
        self.store.save(Kept(self.tables, self.moments, dims, self._rope_sample, meta))

    def _span(self, longest: int) -> int:
        """Positions that tables for ``longest`` tokens are made for: a power of two, so that few are made."""
        assert self.rope is not None
        return min(self.rope.num_positions, max(LEAST_SPAN, 1 << (longest - 1).bit_length()))
