"""Entry point of the SGLang plugin: registers the backend and the hooks, and checks that they took."""

from __future__ import annotations

import multiprocessing
from typing import Any

BACKEND = "vattention"
_PACKAGE = "sglang.srt"
SET_STATE = f"{_PACKAGE}.managers.scheduler.Scheduler.set_internal_state"
GET_STATE = f"{_PACKAGE}.managers.scheduler.Scheduler.get_internal_state"
SUPPORT_TRITON = f"{_PACKAGE}.utils.common.support_triton"
CELL_SIZE = f"{_PACKAGE}.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
HTTP_SERVER = f"{_PACKAGE}.entrypoints.http_server._setup_and_run_http_server"

_failure: BaseException | None = None
_registered: list[str] = []


class PluginError(RuntimeError):
    """The plugin is not whole; SGLang must not serve with it."""


def load() -> None:
    """Entry point ``sglang.srt.plugins``.

    SGLang only logs an exception of a plugin, so it is kept and raised again by `self_check` when a server that wants
    this backend starts. A server with another backend is left alone.
    """
    global _failure
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([BACKEND])
    try:
        _load()
    except Exception as error:
        _failure = error
        raise


def _load() -> None:
    import torch
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def register(target: str, hook: Any, kind: HookType) -> None:
        HookRegistry.register(target, hook, kind)
        _registered.append(target)

    if not torch.cuda.is_available():
        register(SUPPORT_TRITON, _no_triton, HookType.AROUND)
    register_attention_backend(BACKEND)(_create)
    register(SET_STATE, _set_internal_state, HookType.AROUND)
    register(GET_STATE, _get_internal_state, HookType.AFTER)
    register(CELL_SIZE, _add_side_data, HookType.AFTER)
    if multiprocessing.parent_process() is None:
        register(HTTP_SERVER, _before_http_server, HookType.BEFORE)


def self_check() -> None:
    """Make sure that the plugin loaded and every hook is in place.

    Raises
    ------
    PluginError
        With what failed and what to do.
    """
    advice = "Reinstall vattn-sgl for this version of SGLang (supported: 0.5.17 to 0.5.x), or use another backend."
    if _failure is not None:
        raise PluginError(f"vattention: the plugin failed to load: {_failure!r}. {advice}") from _failure
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _registered if target not in HookRegistry._patched]
    if missing or not _registered:
        what = ", ".join(missing) or "all of them; load() was not called"
        raise PluginError(f"vattention: SGLang did not apply these hooks: {what}. {advice}")


def uses_vattention(server_args: Any) -> bool:
    """Whether a server's arguments name this backend."""
    names = ("attention_backend", "decode_attention_backend", "prefill_attention_backend")
    return any(getattr(server_args, name, None) == BACKEND for name in names)


def _create(model_runner: Any) -> Any:
    self_check()
    from vattn_sgl.backend import create

    return create(model_runner)


def _no_triton(original: Any, backend: str) -> bool:
    return False


def _set_internal_state(original: Any, scheduler: Any, recv_req: Any) -> Any:
    from vattn_sgl import control
    from vattn_sgl.admin import REJECTED, STATE_PREFIX

    ours = {k.removeprefix(STATE_PREFIX): v for k, v in recv_req.server_args.items() if k.startswith(STATE_PREFIX)}
    if not ours:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    refused, done = SetInternalStateReqOutput(updated=False), SetInternalStateReqOutput(updated=True)
    current = control.get()
    others = len(recv_req.server_args) > len(ours)
    # SGLang's own route opens without a key where there is none, ours must not.
    if current is None or others or not scheduler.server_args.admin_api_key:
        return refused
    if REJECTED in ours:
        # A counter takes nothing but a step.
        if list(ours.items()) != [(REJECTED, 1)]:
            return refused
        current.changes["rejected"] += 1
        return done
    try:
        current.stage(ours)
    except ValueError:
        return refused
    return done


def _get_internal_state(result: Any, scheduler: Any, recv_req: Any) -> Any:
    from vattn_sgl import control
    from vattn_sgl.admin import STATE_KEY, STATE_REQUEST

    current = control.get()
    # ``GET /server_info`` asks too, and answers without the admin key.
    if current is not None and recv_req.rid == STATE_REQUEST and scheduler.server_args.admin_api_key:
        result.internal_state[STATE_KEY] = {"config": current.config(), "status": current.status()}
    return result


def _add_side_data(cell_size: int, pool_configurator: Any, configurator: Any, num_layers: int) -> int:
    """Bytes of a token in every layer, the side data's share included, so that both fit SGLang's memory budget."""
    if not uses_vattention(configurator.server_args) or configurator.is_draft_worker:
        return cell_size
    from vattn_sgl import compat
    from vattn_sgl.config import load_settings
    from vattn_sgl.selectors import REGISTRY, bytes_per_token

    settings = load_settings()
    geometry = compat.side_geometry(configurator, num_layers)
    return cell_size + bytes_per_token(REGISTRY[settings.selector].layout(settings, geometry), num_layers)


def _before_http_server(server_args: Any, *args: Any, **kwargs: Any) -> None:
    if not uses_vattention(server_args):
        return
    self_check()
    from sglang.srt.entrypoints.http_server import app

    from vattn_sgl.admin import add_routes

    add_routes(app)
