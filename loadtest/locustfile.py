"""One load scenario: short chats and long-prompt completions, streamed, against an OpenAI-compatible server.

Run it with ``make loadtest`` or ``locust -f loadtest/locustfile.py --host URL``; see README.md.
"""

from __future__ import annotations

import logging
import os
import random
import time
from argparse import ArgumentParser
from typing import Any

from attention_metrics import AttentionTotals, scrape
from event_stream import StreamTimings, read_stream
from locust import HttpUser, between, events, task
from locust.env import Environment

logger = logging.getLogger(__name__)

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Name three uses of a paper clip.",
    "Write a haiku about a lighthouse.",
)
# Common short words, nearly one token each in most vocabularies.
_TEXT = (
    "the river house green stone under light over small bird walk year water long paper table morning road winter "
    "glass sound story people garden window quiet north hand field music open answer market young train letter"
)
WORDS = _TEXT.split()

_totals_at_start: AttentionTotals | None = None


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Add the scenario's options to Locust's."""
    group = parser.add_argument_group("vattn-sgl scenario")
    group.add_argument("--model", default="", env_var="LOADTEST_MODEL", help="model name; default: the server's first")
    group.add_argument("--prompt-words", type=int, default=3000, help="words in a long prompt (default 3000)")
    group.add_argument("--output-tokens", type=int, default=64, help="tokens to generate at most (default 64)")
    group.add_argument("--scenario-seed", type=int, default=0, help="seed of the prompts (default 0)")


@events.test_start.add_listener
def remember_totals(environment: Environment, **_: Any) -> None:
    """Scrape the attention counters before the load."""
    global _totals_at_start
    _totals_at_start = scrape(environment.host)


@events.test_stop.add_listener
def report_density(environment: Environment, **_: Any) -> None:
    """Log what the load read, from the counters after and before it."""
    after = scrape(environment.host)
    if after is None or _totals_at_start is None:
        logger.info("no vattention metrics at %s/metrics: start the server with --enable-metrics", environment.host)
        return
    logger.info("%s", after.since(_totals_at_start).describe())


class Reader(HttpUser):
    """Sends three short chats for each long completion."""

    wait_time = between(0.1, 0.5)
    _started = 0

    def on_start(self) -> None:
        """Choose the model and a seed of this user's own."""
        Reader._started += 1
        options = self.environment.parsed_options
        self.random = random.Random(f"{options.scenario_seed}-{Reader._started}")
        self.output_tokens = options.output_tokens
        self.prompt_words = options.prompt_words
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            self.client.headers["Authorization"] = f"Bearer {key}"
        self.model = options.model or self._first_model()

    @task(3)
    def chat(self) -> None:
        """A short question."""
        messages = [{"role": "user", "content": self.random.choice(QUESTIONS)}]
        self._stream("/v1/chat/completions", "chat", {"messages": messages})

    @task(1)
    def long_completion(self) -> None:
        """A prompt that starts differently each time, so that no cached prefix serves it."""
        words = self.random.choices(WORDS, k=self.prompt_words)
        self._stream("/v1/completions", "long completion", {"prompt": " ".join(words)})

    def _first_model(self) -> str:
        response = self.client.get("/v1/models", name="models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])

    def _stream(self, path: str, name: str, body: dict[str, Any]) -> None:
        request = {
            "model": self.model,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }
        started = time.perf_counter()
        with self.client.post(path, json=request, name=name, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}, expected 200: {response.text[:200]}")
                return
            try:
                timings = read_stream(response.iter_lines(), started)
            except ValueError as error:
                response.failure(str(error))
                return
            response.request_meta["response_time"] = timings.total * 1000
            response.success()
        self._record(name, timings)

    def _record(self, name: str, timings: StreamTimings) -> None:
        measured = {"time to first token": timings.first_token, "time per output token": timings.per_output_token}
        for what, seconds in measured.items():
            if seconds is not None:
                self.environment.events.request.fire(
                    request_type="SSE",
                    name=f"{name}: {what}",
                    response_time=seconds * 1000,
                    response_length=timings.output_tokens,
                    exception=None,
                    context={},
                )
