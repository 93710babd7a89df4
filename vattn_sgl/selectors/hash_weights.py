"""HashAttention's learned weights: ``{layer: {query_matrix, query_bias, key_matrix, key_bias}}``, lists of layers.

A matrix is ``[heads, d_in, d_out]``, a bias ``[heads, d_out]``. A torch or pickle file holds that mapping, a
safetensors file the same tensors under ``<layer>.<name>.<index>``. A pickle is read without running what it names.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vattn_kernels import signature
from vattn_sgl.config import ConfigError, Mistake
from vattn_sgl.selectors.base import CacheGeometry

NAMES = ("query_matrix", "query_bias", "key_matrix", "key_bias")
Weights = dict[int, dict[str, list[torch.Tensor]]]


@dataclass(frozen=True)
class Nets:
    """Nets of one layer, packed as in `vattn_kernels.signature.pack`.

    Attributes
    ----------
    query, key : torch.Tensor
        float32 ``[num_qo_heads, parameters]`` and ``[num_kv_heads or num_qo_heads, parameters]``.
    query_widths, key_widths : torch.Tensor
        int32 ``[layers + 1]``, on a CPU: they shape launches.
    """

    query: torch.Tensor
    key: torch.Tensor
    query_widths: torch.Tensor
    key_widths: torch.Tensor

    @property
    def bits(self) -> int:
        """Of a signature."""
        return int(self.key_widths[-1])

    def to(self, device: torch.device) -> Nets:
        """The nets on another device."""
        return Nets(self.query.to(device), self.key.to(device), self.query_widths, self.key_widths)


def _refuse(path: str, found: str, expected: str) -> ConfigError:
    return ConfigError(f"hash_weights {path}", [Mistake("hash_weights", found, expected)])


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _SafeUnpickler(pickle.Unpickler):
    """Knows tensors and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _load_storage,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which weights do not need")
        return known[module, name]


def load(path: str) -> Weights:
    """Read a weight file.

    Parameters
    ----------
    path : str
        ``.safetensors``, torch or pickle file.

    Returns
    -------
    dict
        Layers by number.

    Raises
    ------
    vattn_sgl.config.ConfigError
        If the file is missing, cannot be read or is no mapping of layers; says what was found and expected.
    """
    if not Path(path).is_file():
        raise _refuse(path, "no such file", "a file of HashAttention weights, or another selector")
    return _load(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load(path: str, mtime_ns: int) -> Weights:
    try:
        if path.endswith(".safetensors"):
            found: Any = {}
            for name, tensor in sorted(load_file(path).items(), key=lambda item: item[0].split(".")[::2]):
                layer, kind, _ = name.split(".")
                found.setdefault(int(layer), {}).setdefault(kind, []).append(tensor)
        elif zipfile.is_zipfile(path) or _is_old_torch_file(path):
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with open(path, "rb") as file:
                found = _SafeUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _refuse(path, f"unreadable ({error})", "a safetensors, torch or pickle file of tensors") from error
    if not isinstance(found, dict) or not found:
        raise _refuse(path, type(found).__name__, "a mapping from layer numbers to " + ", ".join(NAMES))
    wrong = [
        Mistake(f"layer {layer!r}", type(layer).__name__, "a layer's number, an int")
        for layer in found
        if not isinstance(layer, int)
    ] or [
        Mistake(f"layer {layer}", _describe(entry), f"lists of equally many tensors, 1 to 3, named {', '.join(NAMES)}")
        for layer, entry in found.items()
        if not _is_layer(entry)
    ]
    if wrong:
        raise ConfigError(f"hash_weights {path}", wrong)
    return found


def _is_old_torch_file(path: str) -> bool:
    """Whether it is of the format before torch 1.6: a pickle that begins with a magic number."""
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, torch.serialization.DEFAULT_PROTOCOL)
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _is_layer(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(NAMES) - set(entry):
        return False
    lists = [entry[name] for name in NAMES]
    return (
        all(isinstance(parts, list) and all(isinstance(part, torch.Tensor) for part in parts) for parts in lists)
        and 1 <= len(lists[0]) <= signature.MAX_LAYERS
        and len(lists[0]) == len(lists[1])
        and 1 <= len(lists[2]) <= signature.MAX_LAYERS
        and len(lists[2]) == len(lists[3])
    )


def _describe(entry: Any) -> str:
    if not isinstance(entry, dict):
        return type(entry).__name__
    return ", ".join(
        f"{key}: {len(part) if isinstance(part, list) else type(part).__name__}" for key, part in entry.items()
    )


def nets(weights: Weights, path: str, geometry: CacheGeometry, layer_ids: Sequence[int]) -> list[Nets]:
    """Packed nets of every layer of a pool.

    Parameters
    ----------
    weights : dict
        From `load`.
    path : str
        Of the file, for messages.
    geometry : CacheGeometry
        Of the pool.
    layer_ids : sequence of int
        The model's numbers of the pool's layers.

    Returns
    -------
    list of Nets

    Raises
    ------
    vattn_sgl.config.ConfigError
        With every layer that is missing or does not fit the model.
    """
    mistakes: list[Mistake] = []
    packed: list[Nets] = []
    bits: set[int] = set()
    key_nets: set[int] = set()
    missing = [layer for layer in layer_ids if layer not in weights]
    if missing:
        have = f"missing, the file has layers {min(weights)} to {max(weights)}"
        what = f"layer {missing[0]}" if len(missing) == 1 else f"{len(missing)} layers from {missing[0]} on"
        mistakes.append(Mistake(what, have, "weights of this very model"))
    for layer in (layer for layer in layer_ids if layer in weights):
        entry = weights[layer]
        wrong = [*_mistakes(entry, layer, "query", geometry), *_mistakes(entry, layer, "key", geometry)]
        mistakes += wrong
        if wrong:
            continue
        query, query_widths = signature.pack(entry["query_matrix"], entry["query_bias"])
        key, key_widths = signature.pack(entry["key_matrix"], entry["key_bias"])
        key_nets.add(key.shape[0])
        bits |= {int(query_widths[-1]), int(key_widths[-1])}
        packed.append(Nets(query, key, query_widths, key_widths).to(geometry.device))
    if len(bits) > 1:
        expected = "one number of bits for the queries and keys of all layers"
        mistakes.append(Mistake("bits", sorted(bits), expected))
    if len(key_nets) > 1:
        mistakes.append(Mistake("key nets", sorted(key_nets), "as many in every layer"))
    if mistakes:
        raise ConfigError(f"hash_weights {path}", mistakes)
    return packed


def _mistakes(entry: dict[str, list[torch.Tensor]], layer: int, side: str, geometry: CacheGeometry) -> list[Mistake]:
    """What of one layer's nets does not fit."""
    matrices, biases = entry[f"{side}_matrix"], entry[f"{side}_bias"]
    shapes = [tuple(m.shape) for m in matrices]
    found: list[Mistake] = []

    def require(fine: bool, what: str, value: Any, expected: str) -> bool:
        if not fine:
            found.append(Mistake(f"layer {layer}: {what}", value, expected))
        return fine

    if not require(all(len(s) == 3 for s in shapes), f"{side}_matrix", shapes, "matrices [heads, d_in, d_out]"):
        return found
    usable = all(t.is_floating_point() and bool(t.isfinite().all()) for t in (*matrices, *biases))
    require(usable, f"{side}_matrix or {side}_bias", "NaN, an infinity or no floating point", "finite numbers")
    heads = shapes[0][0]
    query_heads = geometry.num_qo_heads or heads
    allowed = {query_heads} if side == "query" else {query_heads, geometry.num_kv_heads}
    require(
        heads in allowed, f"heads of {side}_matrix", heads, " or ".join(map(str, sorted(allowed))) + " of the model"
    )
    chain = [geometry.head_dim, *(s[2] for s in shapes)]
    fits = all(s[:2] == (heads, width) for s, width in zip(shapes, chain, strict=False))
    require(
        fits, f"{side}_matrix", shapes, f"matrices that take head_dim {geometry.head_dim}, then each the last's outputs"
    )
    bias_shapes = [tuple(b.shape) for b in biases]
    require(bias_shapes == [(heads, s[2]) for s in shapes], f"{side}_bias", bias_shapes, "biases [heads, d_out]")
    widest = signature.MAX_WIDTH
    require(max(chain) <= widest, f"widths of {side}_matrix", max(chain), f"at most {widest}")
    few = f"32 to {signature.MAX_BITS} bits, a multiple of 32"
    require(chain[-1] % 32 == 0 and 32 <= chain[-1] <= signature.MAX_BITS, f"bits of {side}_matrix", chain[-1], few)
    return found


def words_per_kv_head(path: str, num_kv_heads: int) -> int:
    """Words of side data a token and KV head, from the first layer of a file."""
    last = next(iter(load(path).values()))["key_matrix"][-1]
    if last.ndim != 3:
        return 0  # refused with its layer by `nets`
    return last.shape[0] // num_kv_heads * last.shape[-1] // signature.WORD_BITS


def digest(path: str) -> str:
    """Eight hexadecimal digits of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]
