"""Real servers, started once a session; each costs about 25 s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vattn_sgl import model, texts
from vattn_sgl.server import Server

ADMIN_KEY = "an-admin-key"
COMMON = ("--dtype", "float32", "--context-length", "8192")
EXACT_POOL_TOKENS = 2600


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The demonstration model, from the user's cache."""
    return model.fetch()


@pytest.fixture(scope="session")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without a calibration."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def prompt(model_path: Path) -> list[int]:
    """Tokens of a long English text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [int(i) for i in tokenizer(texts.load(texts.DEMONSTRATION), verbose=False).input_ids]


@pytest.fixture(scope="session")
def dense_tokens(model_path: Path, prompt: list[int]) -> dict[int, list[int]]:
    """Greedy continuations by SGLang's torch_native, by length of the prompt."""
    with Server(model_path, "torch_native", COMMON) as server:
        return {n: server.generate(prompt[:n], 40)["output_ids"] for n in (400, 700, 1900)}


@pytest.fixture(scope="session")
def server(model_path: Path, fresh_cache: Path) -> Iterator[Server]:
    """This backend at epsilon .05, sparse from 512 tokens on, not calibrated at start."""
    env = {"VATTN_CACHE": str(fresh_cache), "VATTN_DENSE_BELOW": "512", "VATTN_AUDIT_RATE": "0.2"}
    arguments = (*COMMON, "--max-total-tokens", "20000", "--chunked-prefill-size", "1024")
    with Server(model_path, "vattention", arguments, env, admin_key=ADMIN_KEY) as started:
        yield started


@pytest.fixture(scope="session")
def exact_server(dense_tokens: object, model_path: Path, server: Server, fresh_cache: Path) -> Iterator[Server]:
    """This backend at epsilon 1e-6 in a tiny pool, without radix cache, with the calibration that `server` left."""
    wait_for_calibration(server, model_path)
    env = {"VATTN_CACHE": str(fresh_cache), "VATTN_DENSE_BELOW": "256", "VATTN_EPSILON": "1e-6"}
    arguments = (*COMMON, "--max-total-tokens", str(EXACT_POOL_TOKENS), "--chunked-prefill-size", "512")
    # Admits more than the pool holds in the end, so that requests are retracted.
    arguments += ("--disable-radix-cache", "--schedule-conservativeness", "0.3")
    with Server(model_path, "vattention", arguments, env, admin_key=ADMIN_KEY) as started:
        yield started


def wait_for_calibration(server: Server, model_path: Path) -> None:
    """Make the server prefill enough to calibrate itself, if it has not yet."""
    if server.admin("GET", "status")["ranks"][0]["calibrated_positions"] == 0:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(model_path)(texts.load(texts.CALIBRATION), verbose=False).input_ids
        server.generate([int(i) for i in ids[:3000]], 4)
