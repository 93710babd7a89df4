"""HTTP routes of the main process; they reach every scheduler through SGLang's internal state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sglang.srt.utils.auth import AuthLevel, auth_level

from vattn_sgl.config import Mistake, PatchError, validate_patch

STATE_KEY = "vattention"
STATE_PREFIX = "vattention_"
# Tells our request for the state from SGLang's own.
STATE_REQUEST = "vattention-state"
REJECTED = "rejected"
# Of a change; an answer tells every wrong field.
MOST_BYTES = 1 << 16


def add_routes(app: FastAPI) -> None:
    """Add the routes to SGLang's application.

    One by one and without an `fastapi.APIRouter`: SGLang's key check looks at the endpoints of the application's own
    routes (``sglang/srt/utils/auth.py``), and behind an included router FastAPI hides them.

    Parameters
    ----------
    app : fastapi.FastAPI
        SGLang's application, before it serves.
    """
    for method, route, endpoint in (
        ("GET", "config", get_config),
        ("PATCH", "config", patch_config),
        ("GET", "status", get_status),
    ):
        app.add_api_route(f"/vattention/{route}", endpoint, methods=[method], tags=["vattention"])


def _tokenizer_manager() -> Any:
    from sglang.srt.entrypoints.http_server import get_global_state

    return get_global_state().tokenizer_manager


async def _set_state(values: Mapping[str, float]) -> list[bool]:
    from sglang.srt.managers.io_struct import SetInternalStateReq

    request = SetInternalStateReq(server_args={STATE_PREFIX + field: value for field, value in values.items()})
    return list(await _tokenizer_manager().set_internal_state(request))


async def _states() -> list[dict[str, Any]]:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = _tokenizer_manager()
    manager.auto_create_handle_loop()
    answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=STATE_REQUEST))
    states = [answer.internal_state for answer in answers]
    return [state[STATE_KEY] for state in states if STATE_KEY in state]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no field stands twice; Python alone would take the last."""
    values: dict[str, list[Any]] = {}
    for field, value in pairs:
        values.setdefault(field, []).append(value)
    twice = [Mistake(field, found, "one value") for field, found in values.items() if len(found) > 1]
    if twice:
        raise PatchError(twice)
    return dict(pairs)


async def _rejected(error: PatchError) -> JSONResponse:
    await _set_state({REJECTED: 1})
    return JSONResponse({"error": "nothing was changed", "detail": error.detail()}, status_code=422)


@auth_level(AuthLevel.ADMIN_FORCE)
async def get_config() -> JSONResponse:
    """Settings, values in force, values staged and the generation, of the first rank."""
    states = await _states()
    return JSONResponse(states[0]["config"] | {"ranks": len(states)})


@auth_level(AuthLevel.ADMIN_FORCE)
async def get_status() -> JSONResponse:
    """Per-layer density, budget and error since start, one entry a data-parallel rank."""
    return JSONResponse({"ranks": [state["status"] for state in await _states()]})


@auth_level(AuthLevel.ADMIN_FORCE)
async def patch_config(request: Request) -> JSONResponse:
    """Stage new values for the next step; 422 names what is wrong and changes nothing."""
    try:
        text = await request.body()
        if len(text) > MOST_BYTES:
            raise ValueError(f"{len(text)} bytes, more than {MOST_BYTES}")
        values = validate_patch(json.loads(text, object_pairs_hook=_object))
    except PatchError as error:
        return await _rejected(error)
    except (ValueError, RecursionError) as error:
        return await _rejected(PatchError([Mistake("body", str(error), "a JSON object")]))
    if not all(await _set_state(values)):
        return JSONResponse({"error": "a scheduler rejected the change; see its log"}, status_code=500)
    config = (await _states())[0]["config"]
    kept = [layer for layer, own in config["layers"].items() if own.keys() & values.keys()]
    return JSONResponse({"staged": values, "layers_with_their_own_value": kept, "config": config})
