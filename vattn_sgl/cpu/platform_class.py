"""The platform's class, apart because it imports SGLang."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.device_mixin import PlatformEnum

from vattn_sgl import compat
from vattn_sgl.cpu.platform import apply_defaults


class PlainCpuPlatform(compat.cpu_platform_base()):  # type: ignore[misc]
    """A CPU on which everything runs through torch alone (``sglang.md``, "On a CPU, as measured")."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, local_rank: int | None = None) -> str:
        """A string, because SGLang splits what it gets here at a colon (``arg_groups/serving_hook.py``)."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Backend when none is named."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Layers take their plain torch form."""
        return "native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """SGLang's own allocator."""
        return compat.paged_allocator_class()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """See `vattn_sgl.cpu.platform.apply_defaults`."""
        apply_defaults(server_args)
