"""Runtime parameters: staged on the host, copied to the device between two batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vattn_kernels import dimensions, params
from vattn_sgl.config import RUNTIME_FIELDS, ConfigError, Mistake, Settings, validate_patch

GLOBAL_LAYER = "all"
_current: RuntimeControl | None = None


def check_layers(settings: Settings, num_layers: int) -> None:
    """Refuse overrides of layers that a model does not have.

    Parameters
    ----------
    settings : Settings
        ``layers``.
    num_layers : int
        Of the model.

    Raises
    ------
    vattn_sgl.config.ConfigError
        With one mistake a key.
    """
    allowed = f"a layer of this model, 0 to {num_layers - 1}"
    mistakes = [
        Mistake(f"layers.{key}", layers[-1], allowed)
        for key, layers in settings.layer_ranges().items()
        if layers[-1] >= num_layers
    ]
    if mistakes:
        raise ConfigError("the settings", mistakes)


class RuntimeControl:
    """Parameters in force in this process; one object however many backends SGLang builds.

    Attributes
    ----------
    params : torch.Tensor
        float32 ``[num_layers, PARAMS_WIDTH]`` on the device, at a fixed address; rows go to the op.
    generation : int
        Counts the changes applied; equal on every rank once a change has arrived.
    changes : dict
        Changes ``applied`` and ``rejected`` since start.
    status_provider : callable or None
        State of the backend for ``GET /vattention/status``.

    Raises
    ------
    vattn_sgl.config.ConfigError
        If the settings override a layer that the model does not have.
    """

    def __init__(self, settings: Settings, num_layers: int, device: torch.device | str) -> None:
        self.settings = settings
        self.num_layers = num_layers
        self.generation = 0
        self.changes = {"applied": 0, "rejected": 0}
        self.status_provider: Callable[[], dict[str, Any]] | None = None
        self._lock = threading.Lock()
        self._values = {field: float(getattr(settings, field)) for field in RUNTIME_FIELDS}
        check_layers(settings, num_layers)
        self._overrides = settings.layer_overrides()
        self._staged: dict[str, float] = {}
        self._dimensions: Sequence[float] = (dimensions.MOST,) * num_layers
        self.params = torch.empty(num_layers, params.PARAMS_WIDTH, dtype=torch.float32, device=device)
        self.params.copy_(self._table())

    def stage(self, patch: dict[str, Any]) -> dict[str, float]:
        """Check a change and keep it for the next step.

        Parameters
        ----------
        patch : dict
            One or more of `vattn_sgl.config.RUNTIME_FIELDS`.

        Returns
        -------
        dict
            The values staged.

        Raises
        ------
        vattn_sgl.config.PatchError
            If anything is wrong; then nothing is staged.
        """
        try:
            values = validate_patch(patch)
        except ValueError:
            self.changes["rejected"] += 1
            raise
        with self._lock:
            self._staged |= values
        return values

    def apply_staged(self) -> bool:
        """Copy what is staged into the device table; called between batches and free when nothing is staged."""
        if not self._staged:
            return False
        with self._lock:
            self._values |= self._staged
            self._staged = {}
            self.params.copy_(self._table(), non_blocking=True)
            self.generation += 1
            self.changes["applied"] += 1
        return True

    def set_dimensions(self, dims: Sequence[float]) -> None:
        """Take what calibration has learnt; called between batches and free when it is the same object.

        Parameters
        ----------
        dims : sequence of float
            Effective dimensions of each layer's values, see `vattn_kernels.dimensions`.
        """
        if dims is self._dimensions:
            return
        with self._lock:
            self._dimensions = dims
            self.params.copy_(self._table(), non_blocking=True)

    def in_force(self) -> dict[str, dict[str, float]]:
        """Values by layer label: ``all``, and the layers that override."""
        return {GLOBAL_LAYER: dict(self._values)} | {str(k): dict(v) for k, v in self._overrides.items() if v}

    def config(self) -> dict[str, Any]:
        """Settings, values in force and staged, and the generation; JSON."""
        with self._lock:
            return {
                "settings": self.settings.model_dump() | {"bound": self.settings.effective_bound} | self._values,
                "in_force": dict(self._values),
                "staged": dict(self._staged),
                "layers": {str(layer): dict(values) for layer, values in self._overrides.items() if values},
                "generation": self.generation,
            }

    def status(self) -> dict[str, Any]:
        """State of the backend, or nothing before it is built."""
        return self.status_provider() if self.status_provider is not None else {}

    def _table(self) -> torch.Tensor:
        rows: dict[tuple[float, float, float], list[float]] = {}
        table = []
        for layer in range(self.num_layers):
            values = self._values | self._overrides.get(layer, {})
            key = (values["epsilon"], values["delta"], self._dimensions[layer])
            if key not in rows:
                rows[key] = params.pack(*key[:2], self.settings.effective_bound, key[2])
            table.append(rows[key])
        return torch.tensor(table, dtype=torch.float32)


def create(settings: Settings, num_layers: int, device: torch.device | str) -> RuntimeControl:
    """The process's control; a second call returns the first one's object."""
    global _current
    if _current is None:
        _current = RuntimeControl(settings, num_layers, device)
    return _current


def get() -> RuntimeControl | None:
    """The process's control, or None where no backend was built."""
    return _current
