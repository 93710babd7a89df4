"""What would stop a server at its start, told before one is started: settings, and whether they suit a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vattn_sgl import control, model_folder, prefill, support
from vattn_sgl.config import ConfigError, Settings, load_settings

if TYPE_CHECKING:
    from vattn_sgl.selectors import CacheGeometry


def check_settings() -> Settings:
    """Settings of a server that is started from here.

    Raises
    ------
    vattn_sgl.config.ConfigError
        If one is wrong by itself.
    vattn_sgl.support.Unsupported
        With all of `settings_reasons`.
    """
    settings = load_settings()
    _refuse(settings_reasons(settings))
    return settings


def check_model(path: Path, settings: Settings) -> None:
    """Refuse a model that cannot be served, or not with these settings.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model.
    settings : Settings
        From `check_settings`.

    Raises
    ------
    vattn_sgl.model_folder.FolderError
        From `vattn_sgl.model_folder.check`.
    vattn_sgl.support.Unsupported
        With all of `fitting_reasons`.
    """
    _refuse(fitting_reasons(settings, geometry(model_folder.check(path))))


def _refuse(reasons: Iterator[str]) -> None:
    if found := list(reasons):
        raise support.Unsupported(found)


def settings_reasons(settings: Settings) -> Iterator[str]:
    """Reasons in settings, whatever the model.

    Parameters
    ----------
    settings : Settings
        In force at start.
    """
    import torch

    for setting in ("prefill_backend", "dense_backend"):
        if (name := getattr(settings, setting)) is not None:
            try:
                prefill.check_name(setting, name)
            except prefill.BackendError as error:
                yield str(error)
    on_gpu = torch.cuda.is_available()
    yield from support.gpu_reasons(SimpleNamespace(), settings) if on_gpu else support.cpu_reasons(settings)


def fitting_reasons(settings: Settings, pool: CacheGeometry) -> Iterator[str]:
    """Reasons in settings that do not suit a model.

    Parameters
    ----------
    settings : Settings
        In force at start.
    pool : CacheGeometry
        From `geometry`.
    """
    from vattn_sgl.selectors import hash_weights

    checks: list[Callable[[], object]] = [lambda: control.check_layers(settings, pool.num_layers)]
    if settings.selector == "hash":
        file = str(settings.hash_weights)
        checks.append(lambda: hash_weights.nets(hash_weights.load(file), file, pool, range(pool.num_layers)))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield from (f"{error.source}: {mistake}" for mistake in error.mistakes)


def geometry(described: Any) -> CacheGeometry:
    """Pool of a model without slots, in the dtype that its configuration names.

    Parameters
    ----------
    described : SimpleNamespace
        From `vattn_sgl.model_folder.describe`.
    """
    import torch

    from vattn_sgl.selectors import CacheGeometry

    dtype = getattr(described.hf_text_config, "dtype", None) or torch.bfloat16
    dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
    layers, heads = described.num_hidden_layers, described.num_key_value_heads
    cpu = torch.device("cpu")
    return CacheGeometry(layers, 0, heads, described.head_dim, cpu, dtype, described.num_attention_heads)
