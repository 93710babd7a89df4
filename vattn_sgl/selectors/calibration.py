"""Calibration of a selector from the traffic itself: when to observe, when to solve, where the result is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vattn_kernels.cache import cache_dir
from vattn_kernels.sketch import Moments, SketchTables, solve
from vattn_sgl.config import Settings
from vattn_sgl.selectors.base import CacheGeometry

logger = logging.getLogger(__name__)

# A basis serves a little beyond the longest position it has seen: on SmolLM2-135M 17 % beyond cost half as many reads
# again and took violations of binding heads from 2.9 to 4.4 %. So contexts that grow are observed early.
COVERAGE_SLACK = 1.125
GROWTH = 1.0625
LEAST_NEW_TOKENS = 64
SAMPLE_TOKENS = 1024
SAMPLE_QUERIES = 32
_MOMENTS = ("qq", "kk", "k", "q_count", "k_count")


class Tables(Protocol):
    """A dataclass of tensors stacked over layers, `SketchTables` or `LineTables`."""

    def to(self, device: torch.device | str) -> Self:
        """Copy on another device."""
        ...


class Solver(Protocol):
    """Turns what was observed into a selector's tables."""

    def __call__(self, moments: Moments, keys: torch.Tensor, queries: torch.Tensor) -> Any:
        """Tables from moments and samples ``[num_layers, n, heads, head_dim]`` of keys and queries."""
        ...


def even_sample(slots: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLE_TOKENS` slots, evenly spread."""
    count = min(SAMPLE_TOKENS, slots.numel())
    return slots[torch.linspace(0, slots.numel() - 1, count, device=slots.device).long()]


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

    def __init__(self, key: str, geometry: CacheGeometry, bits: int, tables: type = SketchTables) -> None:
        name = f"{key}-L{geometry.num_layers}-H{geometry.num_kv_heads}-D{geometry.head_dim}-b{bits}.safetensors"
        self.path = cache_dir() / "calibration" / name
        self.tables = tables
        self.names = [field.name for field in fields(tables)]

    def load(self) -> tuple[Any, Moments, dict[str, int]] | None:
        """Tables, moments and ``{"longest", "tokens"}``, or None when there is no readable file."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                meta = {k: int(v) for k, v in file.metadata().items()}
                tables = self.tables(*(file.get_tensor(f"tables.{name}") for name in self.names))
                moments = Moments(*(file.get_tensor(f"moments.{name}") for name in _MOMENTS))
            return tables, moments, {"longest": meta["longest"], "tokens": meta["tokens"]}
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
            logger.warning("vattention: calibration %s cannot be read (%s); calibrating again", self.path, error)
            return None

    def save(self, tables: Any, moments: Moments, longest: int, tokens: int) -> None:
        """Write by renaming, so that a half-written file is never seen; a full disk is logged, not raised."""
        tensors = {f"tables.{name}": getattr(tables, name).cpu().contiguous() for name in self.names}
        tensors |= {f"moments.{name}": getattr(moments, name).cpu().contiguous() for name in _MOMENTS}
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata={"longest": str(longest), "tokens": str(tokens)})
            draft.replace(self.path)
        except OSError as error:
            logger.warning("vattention: calibration could not be kept at %s (%s)", self.path, error)


class Calibration:
    """Collects moments while they are needed and turns them into tables.

    Attributes
    ----------
    tables : SketchTables or LineTables or None
        None before the first calibration.
    covered : int
        Longest context the tables may be used for, in tokens.
    observed_tokens : int
        Tokens in the moments.

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
    """

    def __init__(
        self, settings: Settings, geometry: CacheGeometry, store: CalibrationStore, solver: Solver | None = None
    ) -> None:
        self.needed = settings.calibration_tokens
        self.keeps_queries = solver is not None
        self.solver: Solver = solver or (lambda moments, keys, queries: solve(moments, keys, settings.sketch_bits))
        self.geometry = geometry
        self.store = store
        self.tables: Any = None
        self.longest = 0
        self.observed_tokens = 0
        self.moments = Moments.zeros(geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.device)
        self._queries: list[torch.Tensor | None] = [None] * geometry.num_layers
        self._new_longest = 0
        self._new_tokens = 0
        loaded = store.load()
        if loaded is not None:
            tables, moments, meta = loaded
            self.tables = tables.to(geometry.device)
            self.moments = Moments(*(getattr(moments, name).to(geometry.device) for name in _MOMENTS))
            self.longest, self.observed_tokens = meta["longest"], meta["tokens"]
            self._new_longest = self.longest

    @property
    def covered(self) -> int:
        """Longest context the tables may be used for."""
        return int(self.longest * COVERAGE_SLACK) if self.tables is not None else 0

    @property
    def _familiar(self) -> int:
        """Longest context that needs no new observation."""
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
        if num_tokens == 0 or (self.tables is not None and longest <= self._familiar):
            return False
        self._new_tokens += num_tokens
        self._new_longest = max(self._new_longest, longest)
        self.observed_tokens += num_tokens
        return True

    def observe(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """Add one layer's queries ``[T, num_qo_heads, head_dim]`` and keys ``[T, num_kv_heads, head_dim]``."""
        self.moments.add(layer, q, k)
        if self.keeps_queries:
            # The last quarter of a pass looks back on most of the keys that are sampled with it.
            first, last = 3 * q.shape[0] // 4, q.shape[0] - 1
            rows = torch.linspace(first, last, min(SAMPLE_QUERIES, last - first + 1), device=q.device).long()
            old = self._queries[layer]
            new = q[rows].float()
            self._queries[layer] = (new if old is None else torch.cat([old, new]))[-SAMPLE_QUERIES:]

    def due(self) -> bool:
        """Whether enough has been observed to solve."""
        if self.tables is None:
            return self._new_tokens >= self.needed
        return self._new_longest > self._familiar and self._new_tokens >= LEAST_NEW_TOKENS

    def solve(
        self,
        keys: Callable[[int, torch.Tensor], torch.Tensor],
        slots: torch.Tensor,
        choose: Callable[[torch.Tensor], torch.Tensor] = even_sample,
    ) -> None:
        """Make tables from the moments and keep them in the store.

        Parameters
        ----------
        keys : callable
            ``keys(layer, slots)`` reads ``[num_samples, num_kv_heads, head_dim]`` from the pool.
        slots : torch.Tensor
            Slots that hold keys.
        choose : callable
            Picks from them the sample that the solver sees.
        """
        sample = choose(slots)
        stacked = torch.stack([keys(layer, sample).float() for layer in range(self.geometry.num_layers)])
        kept = [queries for queries in self._queries if queries is not None]
        self.tables = self.solver(self.moments, stacked, torch.stack(kept) if kept else stacked[:, :0])
        self.longest, self._new_tokens = self._new_longest, 0
        self.store.save(self.tables, self.moments, self.longest, self.observed_tokens)

    def describe(self) -> str:
        """One line for logs and ``vattn doctor``."""
        state = {"covered": self.covered, "observed_tokens": self.observed_tokens, "file": str(self.store.path)}
        return json.dumps(state)
