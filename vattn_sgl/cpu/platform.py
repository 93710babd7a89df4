"""SGLang platform that makes a plain CPU, without sgl_kernel, the embedded default."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

PLATFORM_NAME = "vattn_cpu"
DEFAULT_MAX_TOTAL_TOKENS = 32768
DEFAULT_MAX_RUNNING_REQUESTS = 16


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available() or (hasattr(torch, "npu") and torch.npu.is_available())


def activate() -> str | None:
    """Entry point ``sglang.srt.platforms``.

    Returns
    -------
    str or None
        Path of the platform's class when this machine has neither an accelerator nor SGLang's own CPU kernels, or
        when ``SGLANG_PLATFORM`` names us; else None, and SGLang chooses as if we were not installed.
    """
    chosen = os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME
    if not chosen and (_has_accelerator() or importlib.util.find_spec("sgl_kernel") is not None):
        return None
    return "vattn_sgl.cpu.platform_class.PlainCpuPlatform"


def apply_defaults(server_args: Any) -> None:
    """Fill arguments that a user left open and whose defaults do not suit a CPU.

    Parameters
    ----------
    server_args : ServerArgs
        SGLang's arguments, changed in place.
    """
    if server_args.max_total_tokens is None:
        server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
    if server_args.max_running_requests is None:
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
