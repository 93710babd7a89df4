"""One real server at epsilon .05: serving, telemetry and control. The order of the tests matters for the first two."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from vattn_sgl.demo import totals

pytestmark = pytest.mark.e2e


def status(server):
    return server.admin("GET", "status")["ranks"][0]


def outcomes(server):
    counts = dict.fromkeys(("certified", "uncertified", "capped", "dense"), 0)
    for row in status(server)["layers"]:
        for outcome, count in row["outcome"].items():
            counts[outcome] += count
    return counts


def scrape(server):
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    return [s for family in text_string_to_metric_families(text) for s in family.samples if "vattention" in s.name]


def density_of(server, prompt, tokens=16):
    before = totals(server.admin("GET", "status"))
    server.generate(prompt, tokens)
    after = totals(server.admin("GET", "status"))
    return (after[0] - before[0]) / (after[1] - before[1])


def test_dense_until_calibrated_then_sparse(server, prompt, fresh_cache):
    assert status(server)["calibrated_positions"] == 0
    server.generate(prompt[:900], 4)
    assert outcomes(server)["certified"] == 0
    server.generate(prompt[900:3400], 4)
    covered = status(server)["calibrated_positions"]
    assert covered == 8192, "moved to every position of the model by its rotary embedding"
    assert len(list((fresh_cache / "calibration").glob("*.safetensors"))) == 1
    assert outcomes(server)["certified"] > 0
    assert density_of(server, prompt[900:3400]) < 0.6
    # Cached before the calibration, indexed by it.
    assert density_of(server, prompt[:900]) < 0.95


def test_contexts_longer_than_any_observed_are_sparse_at_once(server, prompt):
    dense = outcomes(server)["dense"]
    assert density_of(server, prompt[:6000]) < 0.4
    assert outcomes(server)["dense"] == dense


def test_chat_answer_is_right(server):
    assert "Paris" in server.chat("What is the capital of France?")


def test_radix_hit(server, prompt):
    first = server.generate(prompt[:1500], 4)
    second = server.generate(prompt[:1500], 4)
    assert second["meta_info"]["cached_tokens"] >= 1490
    assert first["output_ids"][0] == second["output_ids"][0]


def test_sixteen_requests_at_once(server, prompt):
    lengths = [100 + 61 * i for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: server.generate(prompt[n : 2 * n], 12), lengths))
    assert [a["meta_info"]["completion_tokens"] for a in answers] == [12] * 16
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == lengths


def test_aborts_leave_the_server_serving(server, prompt):
    body = {
        "input_ids": prompt[:2000],
        "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True},
        "stream": True,
    }
    for _ in range(4):
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as answer:
            lines = answer.iter_lines()
            assert any(line.startswith(b"data:") for line in lines)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        running = re.search(
            r"^sglang:num_running_reqs\{.*\} (\S+)$", requests.get(f"{server.url}/metrics", timeout=30).text, re.M
        )
        if running is not None and float(running[1]) == 0:
            break
        time.sleep(1)
    assert "Paris" in server.chat("What is the capital of France?")


def test_metrics_agree_with_the_status(server, prompt):
    server.generate(prompt[:1500], 8)
    rows = status(server)["layers"]
    time.sleep(1.5)
    samples = scrape(server)
    for row in rows:
        layer = str(row["layer"])
        mine = [s for s in samples if s.labels.get("layer") == layer]
        read = sum(s.value for s in mine if s.name == "vattention_read_tokens_total")
        context = sum(s.value for s in mine if s.name == "vattention_context_tokens_total")
        steps = {s.labels["outcome"]: s.value for s in mine if s.name == "vattention_head_steps_total"}
        assert read / context == pytest.approx(row["density"], rel=1e-6)
        assert steps == row["outcome"]
    names = {s.name for s in samples}
    assert {"vattention_build_info", "vattention_epsilon", "vattention_calibrated_positions"} <= names
    assert {"vattention_sample_budget_tokens_bucket", "vattention_estimated_relative_error_sum"} <= names


def test_audited_violations_stay_below_delta(server, prompt):
    """Audits of real head-steps; a rate of 2 delta over 3,000 would be 200 above delta's 150: power > .99."""
    server.generate(prompt[:1500], 24)
    rows = status(server)["layers"]
    audits = sum(row["audits"] for row in rows)
    assert audits > 3000
    assert sum(row["audit_violations"] for row in rows) / audits <= 0.05


def test_patch_is_obeyed_by_the_next_step(server, prompt):
    before = density_of(server, prompt[:1500])
    answer = server.admin("PATCH", "config", {"epsilon": 0.4})
    assert answer["staged"] == {"epsilon": 0.4}
    after = density_of(server, prompt[:1500])
    config = server.admin("GET", "config")
    assert config["in_force"]["epsilon"] == 0.4
    assert config["staged"] == {}
    assert after < 0.7 * before
    time.sleep(1.5)
    gauges = [s for s in scrape(server) if s.name == "vattention_epsilon" and s.labels["layer"] == "all"]
    assert [s.value for s in gauges] == [0.4]
    server.admin("PATCH", "config", {"epsilon": 0.05})
    assert density_of(server, prompt[:1500]) == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"epsilon": 2}, "epsilon"),
        ({"delta": 0.7}, "delta"),
        ({"sink": 4}, "sink"),
        ({"epsilon": "x"}, "epsilon"),
        ([], "body"),
    ],
)
def test_wrong_values_answer_422_and_change_nothing(server, body, field):
    before = server.admin("GET", "config")
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    answer = requests.patch(f"{server.url}/vattention/config", headers=headers, json=body, timeout=30)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert [d["field"] for d in detail] == [field]
    assert detail[0]["allowed"]
    assert server.admin("GET", "config") == before


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
@pytest.mark.parametrize(("method", "route"), [("GET", "config"), ("PATCH", "config"), ("GET", "status")])
def test_admin_routes_need_the_key(server, method, route, headers):
    answer = requests.request(
        method, f"{server.url}/vattention/{route}", headers=headers, json={"epsilon": 0.5}, timeout=30
    )
    assert answer.status_code == 401


def test_sglangs_own_routes_show_and_change_nothing_of_ours(server):
    before = server.admin("GET", "config")
    states = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"]
    assert states
    assert not any("vattention" in state for state in states)
    change = {"server_args": {"vattention_epsilon": 0.9}}
    assert requests.post(f"{server.url}/set_internal_state", json=change, timeout=60).status_code == 401
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    for values in ({"vattention_rejected": -1}, {"vattention_delta": 1e-300}):
        body = {"server_args": values}
        answer = requests.post(f"{server.url}/set_internal_state", json=body, headers=headers, timeout=60)
        assert answer.json() == [False]
    assert server.admin("GET", "config") == before
