"""Comparison through a server: what is asked of it, and what its answers amount to."""

from __future__ import annotations

import math

import pytest

from vattn_sgl import demo
from vattn_sgl.eval import served
from vattn_sgl.eval.served import Step

PROMPT, DENSE = [1, 2], [10, 11, 12, 13, 14]
TOP = [{token: math.log(0.5), 99: math.log(0.25)} for token in DENSE]


class FakeServer:
    """Answers with dense's tokens, except where told otherwise."""

    def __init__(self, first=None, second=None):
        self.first, self.second, self.asked = first or {}, second or {}, []

    def generate(self, input_ids, max_new_tokens, **fields):
        j = len(input_ids) - len(PROMPT)
        assert max_new_tokens == 2 and input_ids == PROMPT + DENSE[:j]
        self.asked.append(fields)
        pair = [self.first.get(j, DENSE[j]), self.second.get(j, DENSE[j + 1])]
        wanted = [[math.log(0.25), t, None] for t in fields.get("token_ids_logprob", [])]
        return {"output_ids": pair, "meta_info": {"output_token_ids_logprobs": [None, wanted]}}


def test_steps_are_forced_and_those_with_another_prefill_are_left_out():
    steps = served.forced_steps(FakeServer(first={1: 7}, second={2: 8}), PROMPT, DENSE, 4)
    assert steps == [Step(0, 11, {}), Step(2, 8, {}), Step(3, 14, {})]


def test_agreement_of_the_demonstration_counts_equal_second_tokens():
    assert demo.agreement(FakeServer(first={1: 7}, second={2: 8}), PROMPT, DENSE, 4) == (2 / 3, 3)


def test_log_probabilities_of_denses_tokens_are_asked_for():
    server = FakeServer()
    steps = served.forced_steps(server, PROMPT, DENSE, 3, asked=[list(row) for row in TOP])
    assert server.asked[0] == {"return_logprob": True, "token_ids_logprob": [11, 99]}
    assert steps[0].log_probs == {11: math.log(0.25), 99: math.log(0.25)}
    figures = served.compared(steps, DENSE, TOP)
    assert figures["agreement"] == 1
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["dense_perplexity"] == pytest.approx(2)
    assert figures["kl"] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5))


def test_runs_end_at_the_first_other_token_and_start_again_from_denses():
    dense = list(range(100, 120))

    class Other:
        """Answers with dense's tokens but for the sixth."""

        def generate(self, input_ids, max_new_tokens):
            start = len(input_ids) - len(PROMPT)
            assert input_ids == PROMPT + dense[:start]
            return {"output_ids": [0 if i == 6 else dense[i] for i in range(start, start + max_new_tokens)]}

    # The runs compare tokens 2-5, 6-9 and 10-13; the second ends at token 6, and the third starts from dense's 8.
    assert served.forced_runs(Other(), PROMPT, dense, 12, length=4, skip=1) == [True] * 4 + [False] + [True] * 4


def test_divergence_is_zero_for_dense_and_above_it_otherwise():
    assert served.divergence(TOP[0], TOP[0]) == pytest.approx(0, abs=1e-12)
    assert served.divergence(TOP[0], {10: math.log(0.4), 99: math.log(0.35)}) > 0
    assert served.divergence({1: 0.0}, {1: 0.0}) == pytest.approx(0, abs=1e-12)
