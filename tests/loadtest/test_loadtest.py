from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "loadtest"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


event_stream = load("event_stream")
attention_metrics = load("attention_metrics")


class FakeServer(BaseHTTPRequestHandler):
    """OpenAI-compatible enough: streams four tokens a request and counts them in /metrics."""

    protocol_version = "HTTP/1.1"
    served = 0
    bodies: list[dict]
    broken = False

    def do_GET(self):
        if self.path == "/v1/models":
            return self.reply(200, json.dumps({"data": [{"id": "fake-model"}]}))
        read, context = 10 * self.served_so_far(), 100 * self.served_so_far()
        return self.reply(
            200,
            f'vattention_context_tokens_total{{layer="0"}} {context}\n'
            f'vattention_read_tokens_total{{layer="0",kind="sample"}} {read}\n'
            f'vattention_head_steps_total{{layer="0",outcome="certified"}} {3 * self.served_so_far()}\n'
            f'vattention_head_steps_total{{layer="0",outcome="capped"}} {self.served_so_far()}\n',
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append({"path": self.path, **body})
        type(self).served += 1
        if type(self).broken:
            return self.reply(500, "out of memory")
        events = [{"choices": [self.choice(word)]} for word in ("Par", "is", ".", "!")]
        if self.path.endswith("chat/completions"):
            events.insert(0, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        events.append({"choices": [], "usage": {"completion_tokens": 4}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return self.reply(200, text)

    def choice(self, word):
        return {"delta": {"content": word}} if self.path.endswith("chat/completions") else {"text": word}

    def served_so_far(self):
        return type(self).served + 1

    def reply(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (FakeServer,), {"bodies": [], "served": 0})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{http.server_port}"
    yield handler
    http.shutdown()
    http.server_close()


def run_locust(url):
    return subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(FOLDER / "locustfile.py"), "--headless", "--host", url),
            *("--users", "4", "--spawn-rate", "4", "--run-time", "3s", "--json", "--only-summary"),
            *("--prompt-words", "50", "--output-tokens", "4"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_scenario_measures_both_kinds_of_request(server):
    done = run_locust(server.url)
    assert done.returncode == 0, done.stderr
    stats = {row["name"]: row for row in json.loads(done.stdout)}
    for name in ("chat", "long completion"):
        assert stats[name]["num_requests"] > 0
        assert stats[name]["num_failures"] == 0
        assert stats[f"{name}: time to first token"]["num_requests"] == stats[name]["num_requests"]
        assert stats[f"{name}: time per output token"]["num_requests"] == stats[name]["num_requests"]
    assert "attention: density 0.100, certified head-steps 75.0%" in done.stderr
    assert all(body["model"] == "fake-model" and body["stream"] and body["max_tokens"] == 4 for body in server.bodies)
    prompts = [body["prompt"] for body in server.bodies if body["path"] == "/v1/completions"]
    assert all(len(prompt.split()) == 50 for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_failed_requests_fail_the_run(server):
    server.broken = True
    done = run_locust(server.url)
    assert done.returncode == 1
    assert "out of memory" in done.stderr + done.stdout


def lines(*events):
    return [b"data: " + json.dumps(event).encode() for event in events]


def test_stream_counts_the_tokens_that_the_server_reports():
    text = {"choices": [{"text": "a"}]}
    usage = {"choices": [], "usage": {"completion_tokens": 9}}
    timings = event_stream.read_stream([*lines(text, text, usage), b"", b"data: [DONE]"], 0.0)
    assert timings.output_tokens == 9
    assert 0 < timings.first_token <= timings.last_token <= timings.total


def test_stream_without_usage_counts_events_with_text():
    text, empty = {"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"delta": {"content": ""}}]}
    assert event_stream.read_stream([*lines(empty, text, text), b"data: [DONE]"], 0.0).output_tokens == 2


def test_time_per_output_token_is_between_tokens():
    assert event_stream.StreamTimings(1.0, 4.0, 5.0, 4).per_output_token == pytest.approx(1.0)
    assert event_stream.StreamTimings(1.0, 1.0, 5.0, 1).per_output_token is None


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([b"data: [DONE]"], "no text"),
        (lines({"choices": [{"text": "a"}]}), r"without \[DONE\]"),
        (lines({"error": {"message": "too long"}}), "too long"),
    ],
)
def test_bad_streams_are_failures(stream, message):
    with pytest.raises(ValueError, match=message):
        event_stream.read_stream(stream, 0.0)


def test_metrics_of_another_server_are_none():
    assert attention_metrics.parse("up 1\n") is None
    assert attention_metrics.scrape("http://127.0.0.1:9") is None


def test_no_decode_step_is_said():
    totals = attention_metrics.AttentionTotals(1, 1, 0, 0)
    assert "no decode step" in totals.since(totals).describe()
