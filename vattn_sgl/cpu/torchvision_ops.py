"""Lets the CUDA build of torchvision be imported beside a CPU build of torch.

SGLang imports torchvision before it loads any plugin, and the package index has no CPU build of it: the import stops
at two ops that only the CUDA library declares. `install`, which ``make env`` calls, puts one line into site-packages
that declares them as soon as torchvision is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PTH = "vattn_torchvision.pth"
_LINE = "import vattn_sgl.cpu.torchvision_ops as _v; _v.watch()\n"
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _Watcher(importlib.abc.MetaPathFinder):
    """Declares the ops just before torchvision is imported, so that other programs do not pay for importing torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            define()
        return None


def watch() -> None:
    """Declare the ops when torchvision is imported in this process."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def define() -> None:
    """Declare the ops, unless torch or torchvision is a build that needs no help."""
    import torch

    if torch.version.cuda is not None or "+" in importlib.metadata.version("torchvision"):
        return
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


def install() -> Path:
    """Write the line into this environment.

    Returns
    -------
    pathlib.Path
        The file written.
    """
    target = Path(sysconfig.get_path("purelib")) / PTH
    target.write_text(_LINE)
    return target
