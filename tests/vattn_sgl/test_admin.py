"""Admin routes without a server: bodies, answers and what reaches the schedulers."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.managers.io_struct import GetInternalStateReq
from sglang.srt.utils.auth import add_api_key_middleware

from vattn_sgl import admin, control, plugin
from vattn_sgl.config import Settings

KEY = "an-admin-key"


@pytest.fixture
def sent(monkeypatch):
    """What the routes send to the schedulers; one scheduler answers."""
    current = control.create(Settings(layers={"1": {"epsilon": 0.01}}), 2, "cpu")
    messages = []

    async def set_state(values):
        messages.append(dict(values))
        if admin.REJECTED not in values:
            current.stage(dict(values))
        return [True]

    async def states():
        return [{"config": current.config(), "status": {"layers": []}}]

    monkeypatch.setattr(admin, "_set_state", set_state)
    monkeypatch.setattr(admin, "_states", states)
    return messages


def application(admin_key):
    app = FastAPI()
    add_api_key_middleware(app, api_key="everyone's", admin_api_key=admin_key)
    admin.add_routes(app)
    return app


@pytest.fixture
def client(sent):
    """A client, with the key, of an application with our routes and SGLang's key check."""
    return TestClient(application(KEY), headers={"Authorization": f"Bearer {KEY}"})


def test_get_config_and_status(client):
    config = client.get("/vattention/config").json()
    assert config["in_force"] == {"epsilon": 0.05, "delta": 0.05}
    assert config["settings"]["bound"] == "f8"
    assert config["ranks"] == 1
    assert client.get("/vattention/status").json() == {"ranks": [{"layers": []}]}


def test_patch_stages_and_names_layers_with_their_own_value(client, sent):
    answer = client.patch("/vattention/config", json={"epsilon": 0.2})
    assert answer.status_code == 200
    assert sent == [{"epsilon": 0.2}]
    assert answer.json()["staged"] == {"epsilon": 0.2}
    assert answer.json()["layers_with_their_own_value"] == ["1"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"epsilon": 0}',
        b'{"epsilon": NaN}',
        b'{"epsilon": [1e999]}',
        b'{"window": 3}',
        b"\xff",
    ],
)
def test_a_wrong_body_answers_422_and_changes_nothing(client, sent, body):
    answer = client.patch("/vattention/config", content=body)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert [entry["field"] for entry in detail] in (["body"], ["epsilon"], ["window"])
    assert all(entry["allowed"] for entry in detail)
    assert sent == [{admin.REJECTED: 1}]
    assert client.get("/vattention/config").json()["staged"] == {}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"epsilon": 0.1, "epsilon": 0.2}', [("epsilon", [0.1, 0.2])]),
        (b'{"epsilon": 0.1, "epsilon": 0.1}', [("epsilon", [0.1, 0.1])]),
        (b'{"delta": 9, "epsilon": 0, "delta": 0.1, "epsilon": 0.1}', [("delta", [9, 0.1]), ("epsilon", [0, 0.1])]),
    ],
)
def test_a_field_that_stands_twice_answers_422_and_changes_nothing(client, sent, body, told):
    answer = client.patch("/vattention/config", content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"] == [{"field": f, "value": v, "allowed": "one value"} for f, v in told]
    assert sent == [{admin.REJECTED: 1}]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 50_000,
        b"[" * 800 + b"]" * 800,
        b'{"epsilon": ' + b"[" * 800 + b"]" * 800 + b"}",
        b'{"\\ud800": 1}',
        b'{"epsilon": "\\ud800"}',
        b'{"epsilon": ["\\ud800"]}',
        b'{"epsilon": "' + b"x" * 60_000 + b'"}',
        b'{"' + b"x" * 60_000 + b'": 1}',
        b'{"epsilon": 1' + b"0" * 400 + b"}",
        b'{"epsilon": 1' + b"0" * 5000 + b"}",
        b'{"epsilon": "' + b"x" * 5_000_000 + b'"}',
        b'{"epsilon": {"a": [' + b"1," * 9999 + b"1]}}",
        b"{" + b'"epsilon": 1,' * 4000 + b'"epsilon": 1}',
    ],
    ids=range(13),
)
def test_what_cannot_be_shown_is_shortened(client, sent, body):
    answer = client.patch("/vattention/config", content=body)
    assert answer.status_code == 422
    assert len(answer.content) < 1000
    assert len(answer.json()["detail"]) == 1
    assert sent == [{admin.REJECTED: 1}]


def test_a_scheduler_that_refuses_is_an_error(client, monkeypatch):
    async def refuse(values):
        return [True, False]

    monkeypatch.setattr(admin, "_set_state", refuse)
    assert client.patch("/vattention/config", json={"epsilon": 0.2}).status_code == 500


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("key", [None, "wrong", "everyone's"])
def test_only_the_admin_key_opens_a_route(sent, method, key):
    client = TestClient(application(KEY), headers={} if key is None else {"Authorization": f"Bearer {key}"})
    for route in ("config", "status") if method == "GET" else ("config",):
        assert client.request(method, f"/vattention/{route}", json={"epsilon": 0.2}).status_code == 401
    assert sent == []


def test_a_server_without_an_admin_key_answers_403(sent):
    client = TestClient(application(None), headers={"Authorization": "Bearer everyone's"})
    assert client.get("/vattention/config").status_code == 403
    assert client.patch("/vattention/config", json={"epsilon": 0.2}).status_code == 403
    assert sent == []


def test_our_request_for_the_state_is_told_apart_and_crosses_the_wire(monkeypatch):
    current = control.create(Settings(), 2, "cpu")
    scheduler = SimpleNamespace(server_args=SimpleNamespace(admin_api_key=KEY))

    async def communicator(request):
        arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GetInternalStateReq)
        return [plugin._get_internal_state(SimpleNamespace(internal_state={}), scheduler, arrived)]

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, get_internal_state_communicator=communicator)
    monkeypatch.setattr(admin, "_tokenizer_manager", lambda: manager)
    client = TestClient(application(KEY), headers={"Authorization": f"Bearer {KEY}"})
    assert client.get("/vattention/config").json() == current.config() | {"ranks": 1}
