"""Sampler ``uniform`` of the GPU kernels in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from decode_case import EDGES, FP8, OFFSETS
from interpreted import HEADS, SINK, WINDOW, Step, few_programs, with_fp8_cache  # noqa: F401

from vattn_kernels import ops, sketch
from vattn_kernels.reference import rng
from vattn_kernels.reference import sketch as reference_sketch
from vattn_kernels.reference.decode import decode as reference
from vattn_kernels.reference.uniform import top_k_size
from vattn_kernels.triton import layout

FIXED = SINK + WINDOW
SETTINGS = {"sampler": "uniform", "pilot": 0.1, "pilot_min": 16}


def uniform(selector="oracle", settings=None, **options):
    """A case whose first step, which is read whole, has told the masses that scores are divided by."""
    case = Step(settings=SETTINGS | {"selector": selector} | (settings or {}), **options)
    case.run()
    return case


def expected(case):
    """Output and statistics of the reference."""
    settings = {name: value for name, value in case.step.items() if name != "audit_rate"}
    return reference(*case.arguments()[:14], **settings)


def agrees(case):
    """The results of a step, after they were found to be the reference's."""
    out, stats, counters = case.run()
    true_out, true_stats = expected(case)
    torch.testing.assert_close(out.double(), true_out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(stats.double(), true_stats, rtol=1e-3, atol=1e-4)
    return out, stats, counters


def assert_counted(case, stats, counters):
    """What the statistics say of each head's top-k and sample stands in the counters."""
    budget, read = stats[..., 1].double(), stats[..., 4].double()
    assert counters[OFFSETS[1] + 2] == (read - budget - FIXED).sum()
    assert counters[OFFSETS[1] + 3] == counters[OFFSETS[3]] == budget.sum()


def members(case, request, head):
    """Positions in the range of the top-k and of the sample, from the lists of the last step."""
    slots, pi = case.lists(request, head)
    where = {int(s): i for i, s in enumerate(case.kv_indices[request, SINK : case.context - WINDOW])}
    index = torch.tensor([where[int(s)] for s in slots])
    return index[pi == 1], index[pi < 1]


@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize(("heads", "context"), [(HEADS[0], 501), (HEADS[1], 700), (HEADS[3], 611)])
def test_a_step_is_the_references(target, heads, context):
    case = uniform(
        settings={"target": target}, context=context, num_qo_heads=heads[0], num_kv_heads=heads[1], epsilon=0.3
    )
    _, stats, counters = agrees(case)
    total = context - FIXED
    top_k = top_k_size(-1, 0.025, total)
    assert (stats[..., 1] > max(16, math.ceil(0.1 * total))).any() and (stats[..., 0] < 1).all()
    assert counters[OFFSETS[1] + 2] == top_k * case.batch * heads[0]
    assert counters[OFFSETS[1] + 3] == counters[OFFSETS[3]] == stats[..., 1].double().sum()
    assert counters[OFFSETS[1] : OFFSETS[1] + 5].sum() == stats[..., 4].double().sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k_count": 0}, {"top_k_count": 1}, {"top_k_count": 111}, {"top_k_share": 0.3}, {"pilot": 0.35},
        {"cap": 0.15}, {"cap": 0.05}, {"top_k_share": 0.5, "pilot": 0.4},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_are_the_references(settings):
    agrees(uniform(settings=settings, batch=1, context=640, epsilon=0.15))


def test_the_cap_is_told_head_by_head():
    _, stats, _ = agrees(uniform(settings={"cap": 0.14}, context=1000, num_qo_heads=4, epsilon=0.2))
    assert {ops.OUTCOMES[int(i)] for i in stats[..., 3].flatten()} == {"certified", "uncertified", "capped"}


@pytest.mark.parametrize("settings", [{"top_k_share": 1.0}, {"top_k_count": 10**6}, {"pilot": 1.0}], ids=str)
def test_nothing_is_left_to_sample(settings):
    case = uniform(settings=settings, context=500, num_qo_heads=4)
    out, stats, counters = agrees(case)
    assert case.errors(out).max() < 2e-5
    assert (stats[..., 0] == 1).all() and (stats[..., 2] == 0).all() and (stats[..., 4] == 500).all()
    assert (stats[..., 3] == ops.OUTCOMES.index("certified")).all()
    assert_counted(case, stats, counters)


def test_a_bound_that_asks_for_everything_reads_it():
    case = uniform(context=500, num_qo_heads=4, epsilon=1e-6)
    out, stats, counters = agrees(case)
    assert case.errors(out).max() < 2e-5
    assert (stats[..., 0] == 1).all() and (stats[..., 3] == ops.OUTCOMES.index("certified")).all()
    assert_counted(case, stats, counters)


def test_of_tokens_that_tie_the_first_are_the_top_k():
    case = uniform(batch=1, context=700, num_qo_heads=4)
    case.k_cache.zero_()
    case.run()
    agrees(case)
    top_k, sample = members(case, 0, 1)
    assert top_k.sort().values.tolist() == list(range(math.ceil(0.025 * 620)))
    assert sample.numel() > 0


@pytest.mark.parametrize("context", [111, 337, 1000])
def test_the_sample_is_the_first_of_the_permutation(context):
    case = uniform(context=context, settings={"pilot_min": 8})
    case.run()
    for request in range(case.batch):
        for head in range(case.num_kv_heads):
            top_k, sample = members(case, request, head)
            key = rng.stream_key(case.seed, case.step["layer_id"], head, context)
            order = rng.permutation(context - FIXED, key)
            order = order[~torch.isin(order, top_k)]
            assert sample.sort().values.tolist() == order[: sample.numel()].sort().values.tolist()


@pytest.mark.parametrize("selector", ops.SELECTORS)
def test_the_top_k_have_the_largest_estimates(selector):
    case = uniform(selector, context=800, num_qo_heads=2, settings={"top_k_count": 40})
    case.run()
    for request in range(case.batch):
        for head in range(case.num_kv_heads):
            logits, slots = case.logits(request, head)
            inner = slots[SINK : case.context - WINDOW]
            if selector == "sketch":
                side = (case.side[0][inner, head], case.side[1][inner, head], case.side[3][head])
                tables = (t[head] for t in case.side[4:])
                query = case.q[request, head : head + 1].double()
                estimated, variance = reference_sketch.logits(query, *side, *tables, case.step["sm_scale"])
                estimated = estimated + variance / 2
            else:
                estimated = case.estimated(request, head, inner)
            top_k, _ = members(case, request, head)
            assert top_k.numel() == 40
            others = torch.ones(inner.numel(), dtype=torch.bool)
            others[top_k] = False
            # A sketch's query is rounded to int8, and half the variance is that of all coordinates together.
            slack = 0.35 if selector == "sketch" else 1e-3
            assert estimated[0, top_k].min() >= estimated[0, others].max() - slack
            assert logits[0, SINK + top_k].mean() > logits[0, SINK:-WINDOW].mean()


@pytest.mark.parametrize(("dtype", "k_scale", "v_scale"), FP8)
def test_a_scaled_fp8_cache_is_sampled_as_what_it_stands_for(dtype, k_scale, v_scale):
    cases = with_fp8_cache(dtype, k_scale, v_scale, context=400, settings=SETTINGS | {"audit_rate": 1.0}, epsilon=0.3)
    results = []
    for case in cases:
        case.run()
        results.append((*case.run(), case.state, *(m for r in (0, 1) for m in members(case, r, 0))))
    (out, stats, counters, state, *listed), (plain_out, plain_stats, plain_counters, plain_state, *plain) = results
    assert all(torch.equal(a, b) for a, b in zip(listed, plain, strict=True)) and 0 < float(stats[..., 0].max()) < 1
    torch.testing.assert_close(out, plain_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats, plain_stats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(counters, plain_counters)
    torch.testing.assert_close(state, plain_state, rtol=1e-4, atol=1e-4)


def test_a_query_unlike_the_last_one_is_ranked_by_what_sink_and_window_held_of_that_ones_mass():
    case = uniform(context=700, settings={"top_k_count": 40})
    places = [(request, head) for request in range(case.batch) for head in range(case.num_kv_heads)]

    def masses(place):
        logits, _ = case.logits(*place)
        fixed = torch.cat([logits[:, :SINK], logits[:, -WINDOW:]], 1)
        return logits.logsumexp(1), fixed.logsumexp(1)

    last = {place: masses(place) for place in places}
    case.q = 2 * case.q.roll(1, 1)
    case.run()
    unmoved = 0
    for place in places:
        logits, (whole, fixed) = case.logits(*place)[0][:, SINK:-WINDOW], masses(place)
        predicted = last[place][0] - last[place][1] + fixed
        ranked, by_its_own = (
            (logits - mass[:, None]).amax(0).topk(40).indices.sort().values for mass in (predicted, whole)
        )
        top_k, _ = members(case, *place)
        assert torch.equal(top_k.sort().values, ranked)
        unmoved += int(torch.equal(ranked, by_its_own))
    assert unmoved < len(places)


def test_a_head_alone_ranks_any_query_like_the_reference():
    case = uniform(context=700, num_qo_heads=2, num_kv_heads=2, epsilon=0.3)
    case.q = 2 * case.q.roll(1, 1)
    agrees(case)


@pytest.mark.parametrize("selector", ["sketch", "quest"])
def test_what_has_no_usable_side_data_is_sampled_and_no_member(selector):
    case = uniform(selector, context=700, num_qo_heads=2, settings={"pilot": 0.4})
    chosen = case.kv_indices[:, 100:300].long()
    if selector == "sketch":
        case.side[1][chosen, :, 0] = sketch.UNUSABLE
    else:
        case.side[2][chosen] = 0
    case.run()
    for request in range(case.batch):
        for head in range(case.num_kv_heads):
            top_k, sample = members(case, request, head)
            assert not ((top_k >= 100 - SINK) & (top_k < 300 - SINK)).any()
            assert ((sample >= 100 - SINK) & (sample < 300 - SINK)).sum() > 20


def test_an_audit_counts_the_true_errors():
    case = uniform(context=500, num_qo_heads=4, epsilon=0.02, settings={"cap": 0.15})
    before = case.state.clone()
    plain = case.run()
    case.state.copy_(before)
    case.step["audit_rate"] = 1.0
    out, stats, counters = case.run()
    assert torch.equal(out, plain[0]) and torch.equal(stats, plain[1])
    errors = case.errors(out).flatten()
    assert counters[OFFSETS[5] : OFFSETS[5] + 2].tolist() == [errors.numel(), int((errors > 0.02).sum())]
    buckets = torch.bucketize(errors, EDGES.double()).bincount(minlength=len(EDGES) + 1)
    assert torch.equal(counters[OFFSETS[6] + 1 :], buckets.double())


def test_requests_of_every_length_stand_in_one_batch():
    case = uniform(batch=4, context=600, num_qo_heads=2)
    case.seq_lens = torch.tensor([600, 0, 90, 333])
    case.run()
    out, stats, _ = case.run()
    true_out, true_stats = expected(case)
    torch.testing.assert_close(out.double(), true_out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(stats.double()[[0, 2, 3]], true_stats[[0, 2, 3]], rtol=1e-3, atol=1e-4)
    assert stats[2, 0, 3] == ops.OUTCOMES.index("dense") != stats[3, 0, 3]


def test_two_runs_give_equal_bits_and_another_seed_another_sample():
    case = uniform(context=500, num_qo_heads=2)
    first = case.run()
    assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))
    sample = members(case, 0, 0)[1]
    case.step["seed"] += 1
    out, _, _ = case.run()
    assert not torch.equal(out, first[0])
    assert set(members(case, 0, 0)[1].tolist()) != set(sample.tolist())


def test_ranking_grows_with_the_workspace():
    layout._rankings.clear()
    sizes = []
    for context in (200, 900, 300):
        uniform(context=context, batch=1)
        sizes.append(layout._rankings[torch.device("cpu")].ranks.numel())
    assert sizes[0] <= sizes[1] == sizes[2] >= 900
