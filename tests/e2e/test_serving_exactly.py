"""A server at epsilon 1e-6 equals a dense one token by token, also under chunked prefill, a tiny pool and restarts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from vattn_sgl.server import REQUEST_LIMIT_S

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("length", [700, 1900])
def test_equal_to_dense_token_by_token(exact_server, prompt, dense_tokens, length):
    assert exact_server.generate(prompt[:length], 40)["output_ids"] == dense_tokens[length]


def test_calibration_is_loaded_at_the_next_start(exact_server, prompt):
    assert exact_server.admin("GET", "status")["ranks"][0]["calibrated_positions"] == 8192
    assert "calibration loaded" in exact_server.log.read_text(errors="replace")
    exact_server.generate(prompt[:700], 4)
    rows = exact_server.admin("GET", "status")["ranks"][0]["layers"]
    assert all(row["outcome"]["certified"] > 0 for row in rows)


def test_retraction_under_a_tiny_pool(exact_server, prompt, dense_tokens):
    # With ignore_eos SGLang would admit only what fits to the end.
    body = {"input_ids": prompt[:400], "sampling_params": {"temperature": 0, "max_new_tokens": 180}}
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(
                lambda _: requests.post(f"{exact_server.url}/generate", json=body, timeout=REQUEST_LIMIT_S).json(),
                range(6),
            )
        )
    for answer in answers:
        assert answer["meta_info"]["completion_tokens"] == 180
        assert answer["output_ids"][:40] == dense_tokens[400]
    assert "KV cache pool is full. Retract requests" in exact_server.log.read_text(errors="replace")
