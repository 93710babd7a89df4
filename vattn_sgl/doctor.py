"""``vattn doctor``: can this machine and model be served, and if not, why."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil

from vattn_sgl import compat, model, model_folder, preflight, support
from vattn_sgl.config import PREFIX, ConfigError, Settings, load_settings

if TYPE_CHECKING:
    from vattn_sgl.selectors import CacheGeometry

LEAST_MEMORY_GIB = 6.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    ok : bool
        False stops serving.
    what : str
        What was looked at and found.
    mend : str
        What to do, when not ok or when a server needs an argument; empty where ``what`` says it.
    """

    ok: bool
    what: str
    mend: str = ""


def run(model_path: Path | None) -> bool:
    """Print the report.

    Parameters
    ----------
    model_path : pathlib.Path, optional
        Folder of the model; default the demonstration's.

    Returns
    -------
    bool
        Whether everything needed is there.
    """
    from rich.console import Console

    console = Console(highlight=False)
    fine = True
    for finding in findings(model_path):
        fine = fine and finding.ok
        mark = "[green]ok  [/green]" if finding.ok else "[red]FAIL[/red]"
        console.print(f"{mark} {finding.what}" + (f"\n     -> {finding.mend}" if finding.mend else ""), soft_wrap=True)
    console.print("This machine can serve." if fine else "This machine cannot serve yet.")
    return fine


def findings(model_path: Path | None) -> Iterator[Finding]:
    """Every check in turn.

    Parameters
    ----------
    model_path : pathlib.Path, optional
        As for `run`.
    """
    for check in (_python, _packages, _plugin, _kernels, _memory):
        yield _guard(check)
    settings = Settings()
    try:
        settings = load_settings()
        yield Finding(
            True, f"settings: epsilon {settings.epsilon}, delta {settings.delta}, selector {settings.selector}"
        )
    except ConfigError as error:
        yield Finding(False, f"settings: {error}", _mend(error))
    for reason in preflight.settings_reasons(settings):
        yield Finding(False, f"settings: {reason}")
    yield from _model(model_path, settings)


def _mend(error: ConfigError) -> str:
    if all(mistake.line is None and mistake.key.startswith(PREFIX) for mistake in error.mistakes):
        return "set the variable named to what is expected, or unset it"
    return f"vattn config check {os.environ['VATTN_CONFIG']} shows every mistake of the file with its line"


def _guard(check: Callable[..., Finding], *arguments: Any) -> Finding:
    try:
        return check(*arguments)
    except model.ModelError as error:
        return Finding(False, str(error))
    except Exception as error:
        return Finding(False, f"{check.__name__.strip('_')}: {error}", "mend what the message names")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        sys.version_info >= (3, 11), f"Python {version}", "" if sys.version_info >= (3, 11) else "use 3.11 or newer"
    )


def _packages() -> Finding:
    sglang, torch = importlib.metadata.version("sglang"), importlib.metadata.version("torch")
    low, below = (".".join(map(str, v)) for v in (compat.MINIMUM, compat.BELOW))
    inside = compat.MINIMUM <= compat.version_tuple(sglang) < compat.BELOW
    return Finding(inside, f"sglang {sglang}, torch {torch}", "" if inside else f"install sglang >={low},<{below}")


def _plugin() -> Finding:
    names = {e.name for e in importlib.metadata.entry_points(group="sglang.srt.plugins")}
    allowed = os.environ.get("SGLANG_PLUGINS")
    if "vattention" not in names:
        return Finding(False, "the plugin is not registered", "install this package: pip install --no-deps -e .")
    if allowed and "vattention" not in [name.strip() for name in allowed.split(",")]:
        return Finding(False, f"SGLANG_PLUGINS={allowed} leaves the plugin out", "add vattention to it, or unset it")
    return Finding(True, "the plugin is registered with SGLang")


def _kernels() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(True, f"GPU {torch.cuda.get_device_name()}: kernels are compiled as a server starts")
    from vattn_kernels.cpu import build

    return Finding(True, f"CPU kernels compiled by {build.compiler()}: {build.build()}")


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    enough = free >= LEAST_MEMORY_GIB
    mend = (
        ""
        if enough
        else f"a server of the demonstration model wants {LEAST_MEMORY_GIB:.0f} GiB; lower --max-total-tokens"
    )
    return Finding(enough, f"{free:.1f} GiB of memory free, {os.cpu_count()} cores", mend)


def _model(path: Path | None, settings: Settings) -> Iterator[Finding]:
    if path is None:
        path = model.folder()
        if not model.is_whole(path):
            yield Finding(False, f"model {model.NAME} is not in the cache", "vattn model fetch")
            return
    try:
        described = model_folder.describe(path)
    except model.ModelError as error:
        yield Finding(False, str(error), "give the folder of a decoder model with attention")
        return
    yield _guard(_tokenizer, path)
    weights = _guard(_weights, path)
    yield weights
    reasons = [*support.argument_reasons(SimpleNamespace(device="cpu")), *model_folder.reasons(described)]
    if reasons:
        for reason in reasons:
            yield Finding(False, f"model {path.name}: {reason}")
        return
    heads = f"{described.num_attention_heads} query and {described.num_key_value_heads} KV heads"
    yield Finding(True, f"model {path.name}: {heads} of {described.head_dim}")
    yield from _dtype(described)
    geometry = preflight.geometry(described)
    misfits = list(preflight.fitting_reasons(settings, geometry))
    for reason in misfits:
        yield Finding(False, reason)
    if misfits:
        return
    side_data = _guard(_side_data, geometry, settings)
    yield side_data
    if side_data.ok and weights.ok:
        yield _guard(_calibration, path, geometry, settings)


def _tokenizer(path: Path) -> Finding:
    return Finding(True, f"tokenizer of {len(model_folder.load_tokenizer(path))} tokens")


def _weights(path: Path) -> Finding:
    count = model_folder.check_weights(path)
    return Finding(True, f"weights in {count} file{'s' * (count > 1)}")


def _dtype(described: Any) -> Iterator[Finding]:
    """What SGLang serves the model in unless it is told, where a CPU cannot."""
    import torch

    dtype = compat.default_dtype(described.hf_text_config)
    if not torch.cuda.is_available() and list(support.cpu_pool_reasons(SimpleNamespace(dtype=dtype))):
        name = str(dtype).removeprefix("torch.")
        yield Finding(
            True,
            f"by default SGLang serves this model in {name}, which the CPU kernels do not read",
            "start with --dtype float32 or --dtype bfloat16",
        )


def _side_data(geometry: CacheGeometry, settings: Settings) -> Finding:
    from vattn_sgl.selectors import REGISTRY, bytes_per_token

    side = bytes_per_token(REGISTRY[settings.selector].layout(settings, geometry), geometry.num_layers)
    kv = geometry.kv_bytes_per_token()
    name = str(geometry.dtype).removeprefix("torch.")
    return Finding(
        True, f"selector {settings.selector} keeps {side} bytes a token beside {kv} of {name} K and V: {side / kv:.1%}"
    )


def _calibration(path: Path, geometry: CacheGeometry, settings: Settings) -> Finding:
    if settings.selector == "oracle":
        return Finding(True, "selector oracle needs no calibration")
    from vattn_sgl.selectors import REGISTRY
    from vattn_sgl.selectors.calibrated import CalibratedSelector
    from vattn_sgl.selectors.calibration import model_key

    selector = REGISTRY[settings.selector](settings, geometry, range(geometry.num_layers), model_key(str(path)))
    assert isinstance(selector, CalibratedSelector)
    store = selector.calibration.store
    loaded = store.load()
    if loaded is None:
        advice = (
            f"a server calibrates itself on the first {settings.calibration_tokens} prefilled tokens, dense until then"
        )
        return Finding(True, f"no calibration yet: {advice}; vattn calibrate {path} makes one ahead")
    meta = loaded.meta
    return Finding(
        True, f"calibrated on {meta['tokens']} tokens, covers contexts up to {meta['covered']} tokens ({store.path})"
    )
