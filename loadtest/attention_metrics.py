"""Reads vAttention's counters from a server's `/metrics`."""

from __future__ import annotations

from dataclasses import dataclass

import requests
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class AttentionTotals:
    """Sums of the counters over layers and ranks.

    Attributes
    ----------
    context_tokens, read_tokens : float
    certified, sparse_steps : float
        Head-steps that were certified, and those that were not dense.
    """

    context_tokens: float
    read_tokens: float
    certified: float
    sparse_steps: float

    def since(self, before: AttentionTotals) -> AttentionTotals:
        """Return what was added after `before`."""
        return AttentionTotals(
            self.context_tokens - before.context_tokens,
            self.read_tokens - before.read_tokens,
            self.certified - before.certified,
            self.sparse_steps - before.sparse_steps,
        )

    def describe(self) -> str:
        """One line for people."""
        if self.context_tokens <= 0:
            return "attention: no decode step was counted during the load"
        density = self.read_tokens / self.context_tokens
        certified = f"{self.certified / self.sparse_steps:.1%}" if self.sparse_steps > 0 else "none (all dense)"
        return f"attention: density {density:.3f}, certified head-steps {certified}"


def parse(text: str) -> AttentionTotals | None:
    """Sum the counters of an exposition; None if it has none of them."""
    context = read = certified = sparse = 0.0
    found = False
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vattention_context_tokens_total":
                context += sample.value
                found = True
            elif sample.name == "vattention_read_tokens_total":
                read += sample.value
            elif sample.name == "vattention_head_steps_total":
                outcome = sample.labels["outcome"]
                certified += sample.value if outcome == "certified" else 0.0
                sparse += sample.value if outcome != "dense" else 0.0
    return AttentionTotals(context, read, certified, sparse) if found else None


def scrape(host: str | None) -> AttentionTotals | None:
    """Read the counters of the server at `host`; None if it serves none."""
    try:
        response = requests.get(f"{host}/metrics", timeout=10)
    except requests.RequestException:
        return None
    return parse(response.text) if response.ok else None
