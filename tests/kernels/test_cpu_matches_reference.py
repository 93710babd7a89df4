"""The CPU implementation against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from decode_case import DecodeCase

from vattn_kernels import ops, pages, quantiles, reference, signature
from vattn_kernels.reference import rng

SHAPES = [
    pytest.param({"batch": 1, "context": 1000, "num_qo_heads": 3, "num_kv_heads": 1}, id="B1-N1000-H3-1"),
    pytest.param({"batch": 2, "context": 511, "num_qo_heads": 9, "num_kv_heads": 3}, id="B2-N511-H9-3"),
    pytest.param(
        {"batch": 1, "context": 2049, "num_qo_heads": 4, "num_kv_heads": 1, "head_dim": 128}, id="B1-N2049-H4-1-D128"
    ),
    pytest.param({"batch": 3, "context": 145, "num_qo_heads": 2, "num_kv_heads": 2}, id="B3-N145-H2-2"),
    pytest.param({"batch": 2, "context": 111, "num_qo_heads": 2, "num_kv_heads": 1}, id="B2-N111-H2-1-dense"),
]
INDEXED = [selector for selector in ops.SELECTORS if selector != "oracle"]
READ = ops.STATS.index("read")
OUTCOME = ops.STATS.index("outcome")


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` over all elements."""
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize("selector", ops.SELECTORS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_decode(shape, sampler, selector, target):
    case = DecodeCase(**shape, epsilon=0.2, settings={"sampler": sampler, "selector": selector, "target": target})
    assert_matches(case)


@pytest.mark.parametrize("epsilon", [0.1, 0.9])
@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize("selector", quantiles.PROVABLE_SELECTORS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_decode_with_a_provable_bound(sampler, selector, target, epsilon):
    case = DecodeCase(
        batch=1,
        context=3000,
        epsilon=epsilon,
        chosen_bound="bernstein",
        bits=128,
        score_scale=0.4,
        settings={"sampler": sampler, "selector": selector, "target": target, "pilot": 0.1},
    )
    assert_matches(case)


@pytest.mark.parametrize("bound", [None, "bernstein"])
@pytest.mark.parametrize("group_score", ["max", "mean"])
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_decode_with_codes_that_miss_by_far(sampler, group_score, bound):
    settings = {"sampler": sampler, "selector": "sketch", "group_score": group_score}
    case = DecodeCase(batch=1, context=3000, epsilon=0.2, chosen_bound=bound, bits=128, settings=settings)
    case.plant_wild_keys()
    assert_matches(case)


def assert_matches(case: DecodeCase) -> None:
    """Sample, output and stats of both, where rounding lets the samples be equal."""
    out, stats, _ = case.run()
    expected, expected_stats = reference.decode(*case.arguments()[:14], **case.step)
    same_sample = stats[..., READ].double() == expected_stats[..., READ]
    # A token whose rank lies within rounding of the scale may be drawn by one and not by the other.
    assert same_sample.double().mean() >= 0.6
    close = (stats[..., READ].double() - expected_stats[..., READ]).abs() <= 0.02 * expected_stats[..., READ] + 2
    assert close.all()
    assert relative_rms(out[same_sample], expected[same_sample]) < 1e-4
    assert torch.allclose(stats[same_sample].double(), expected_stats[same_sample], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("top_k", [0, 20, 300])
@pytest.mark.parametrize("bound", ["student", "bernstein"])
def test_the_uniform_sample_is_the_permutation_without_the_top_k(bound, top_k):
    """The op reads exactly the tokens that the reference's permutation names: the values of all others are NaN."""
    # The norms of all values are part of what bernstein knows about the other targets.
    settings = {"sampler": "uniform", "target": "denominator", "top_k_count": top_k, "pilot": 0.1, "cap": 0.4}
    case = DecodeCase(context=900, epsilon=0.5, chosen_bound=bound, settings=settings)
    total, group = case.context - 80, case.num_qo_heads // case.num_kv_heads
    for b in range(case.batch):
        for h in range(case.num_kv_heads):
            # Scores far apart, so that rounding cannot change their order; the same for every query head.
            slots, heavy = case.kv_indices[b].long(), 16 + 7 * torch.arange(top_k) % total
            case.k_cache[slots, h] *= 0.01
            case.k_cache[slots[heavy], h] += torch.linspace(3, 2, top_k)[:, None]
            case.q[b, h * group : (h + 1) * group] = 0.1
    _, stats, _ = case.run()
    values = case.v_cache.clone()
    for b in range(case.batch):
        for h in range(case.num_kv_heads):
            order = rng.permutation(total, rng.stream_key(case.seed, case.step["layer_id"], h, case.context))
            members = 7 * torch.arange(top_k) % total
            order = order[~torch.isin(order, members)]
            budget = int(stats[b, h * group, ops.STATS.index("budget")])
            assert int(stats[b, h * group, READ]) == 80 + top_k + budget
            unread = case.kv_indices[b, 16 + order[budget:]].long()
            assert budget > 0 and unread.numel() > 0
            case.v_cache[unread, h] = float("nan")
    out, again, _ = case.run()
    assert torch.equal(stats, again)
    case.v_cache = values
    expected, expected_stats = reference.decode(*case.arguments()[:14], **case.step)
    assert torch.equal(stats[..., READ].double(), expected_stats[..., READ])
    assert relative_rms(out, expected) < 1e-5


@pytest.mark.parametrize("group_score", ops.GROUP_SCORES)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_group_score(sampler, group_score):
    settings = {"sampler": sampler, "selector": "sign", "group_score": group_score}
    case = DecodeCase(context=1500, num_qo_heads=8, epsilon=0.2, settings=settings)
    out, stats, _ = case.run()
    expected, expected_stats = reference.decode(*case.arguments()[:14], **case.step)
    same = stats[..., READ].double() == expected_stats[..., READ]
    assert same.double().mean() >= 0.6
    assert relative_rms(out[same], expected[same]) < 1e-4


@pytest.mark.parametrize("cap", [0.05, 0.3])
@pytest.mark.parametrize("target", ["output", "denominator"])
@pytest.mark.parametrize("selector", ops.SELECTORS)
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_cap(sampler, selector, target, cap):
    settings = {"sampler": sampler, "selector": selector, "target": target, "cap": cap}
    case = DecodeCase(context=2000, epsilon=0.02, settings=settings)
    out, stats, _ = case.run()
    expected, expected_stats = reference.decode(*case.arguments()[:14], **case.step)
    assert torch.equal(stats[..., OUTCOME].double(), expected_stats[..., OUTCOME])
    assert torch.allclose(stats[..., READ].double(), expected_stats[..., READ], rtol=0.02, atol=2)
    same = stats[..., READ].double() == expected_stats[..., READ]
    assert same.double().mean() >= 0.6
    assert relative_rms(out[same], expected[same]) < 1e-4


@pytest.mark.parametrize("selector", INDEXED)
def test_coarse_scores_leave_the_norms_of_values_out(selector):
    """At a cap one score's sample follows it alone, so other norms change it only where they are part of the score."""
    settings = {"selector": selector, "cap": 0.1, "group_score": "mean"}
    case, other = (DecodeCase(context=2000, epsilon=1e-9, settings=settings) for _ in range(2))
    other.v_cache *= torch.linspace(0.1, 10, other.v_cache.shape[0])[:, None, None]
    other.index()
    (_, stats, _), (_, others, _) = case.run(), other.run()
    assert torch.equal(stats[..., READ], others[..., READ]) == (selector in quantiles.COARSE_SELECTORS)


@pytest.mark.parametrize("selector", INDEXED)
def test_invalid_slots_agree(selector):
    case = DecodeCase(context=1500, epsilon=0.2, settings={"selector": selector})
    case.side[2][case.kv_indices[:, 200:300].reshape(-1).long()] = 0
    out, stats, _ = case.run()
    expected, expected_stats = reference.decode(*case.arguments()[:14], **case.step)
    same = stats[..., READ].double() == expected_stats[..., READ]
    assert same.double().mean() >= 0.6
    assert relative_rms(out[same], expected[same]) < 1e-4


@pytest.mark.parametrize("selector", [s for s in quantiles.PROVABLE_SELECTORS if s in INDEXED])
@pytest.mark.parametrize("sampler", ops.SAMPLERS)
def test_invalid_slots_have_no_provable_bound(sampler, selector):
    """``proportional`` reads them for certain; ``uniform`` has to read everything."""
    settings = {"sampler": sampler, "selector": selector, "pilot": 0.1}
    case = DecodeCase(context=3000, epsilon=0.9, bits=128, score_scale=0.4, chosen_bound="bernstein", settings=settings)
    case.side[2][case.kv_indices[:, 200:300].reshape(-1).long()] = 0
    assert_matches(case)
    assert (case.run()[1][..., ops.STATS.index("density")] == 1).all() == (sampler == "uniform")


@pytest.mark.parametrize("bits", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_encode(bits, head_dim):
    case = DecodeCase(batch=1, context=400, head_dim=head_dim, bits=bits, settings={"selector": "sketch"})
    codes, norms, valid = case.encode_arguments[-3:]
    expected = [torch.zeros_like(t) for t in (codes, norms, valid)]
    reference.encode(*case.encode_arguments[:-3], *expected)
    # float32 against float64: a coordinate within rounding of a step's border may fall to either side.
    assert (codes == expected[0]).double().mean() > 0.998
    assert (norms == expected[1]).double().mean() > 0.99
    assert torch.equal(valid, expected[2])


@pytest.mark.parametrize("bits", [32, 64, 128])
@pytest.mark.parametrize("selector", ["sign", "hash"])
def test_encode_signature(selector, bits):
    case = DecodeCase(batch=1, context=400, bits=bits, settings={"selector": selector})
    codes, norms, valid, centred = case.encode_arguments[-4:]
    expected = [torch.zeros_like(t) for t in (codes, norms, valid)]
    reference.encode_signature(*case.encode_arguments[:-4], *expected, centred)
    differing = signature.to_bits(codes ^ expected[0]).double().mean()
    # float32 against float64: an output within rounding of 0 may fall to either side.
    assert differing < 1e-4
    assert (norms == expected[1]).double().mean() > 0.99
    assert torch.equal(valid, expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_pages(dtype):
    case = DecodeCase(batch=1, context=402, dtype=dtype, settings={"selector": "quest"})
    bounds, norms, valid = case.encode_arguments[-3:]
    expected = [torch.zeros_like(t) for t in (bounds, norms, valid)]
    reference.encode_pages(*case.encode_arguments[:-3], *expected)
    assert torch.equal(bounds, expected[0])
    assert (norms == expected[1]).double().mean() > 0.99
    assert torch.equal(valid, expected[2])


def test_pages_of_few_slots_cover_the_valid_ones_only():
    case = DecodeCase(batch=1, context=402, settings={"selector": "quest"})
    bounds, norms, valid = case.encode_arguments[-3:]
    valid.zero_()
    case.k_cache[17] = 1e6
    ops.encode_pages(case.k_cache, case.v_cache, torch.tensor([16, 20, 408]), bounds, norms, valid)
    assert torch.equal(bounds[1, :, 0], torch.minimum(case.k_cache[16], case.k_cache[20]))
    assert torch.equal(bounds[1, :, 1], torch.maximum(case.k_cache[16], case.k_cache[20]))
    assert torch.equal(bounds[25, :, 0], case.k_cache[408])
    assert valid.nonzero()[:, 0].tolist() == [16, 20, 408]


def test_page_bounds_bound_every_logit():
    case = DecodeCase(batch=1, context=402, settings={"selector": "quest"})
    case.k_cache[:16] = case.k_cache[:1]
    case.index()
    slots = torch.arange(case.k_cache.shape[0])
    for head in range(case.num_kv_heads):
        q, k = case.q[0].double(), case.k_cache[:, head].double()
        bound = pages.upper_bound(q, case.side[0][slots // pages.PAGE, head].double(), 0.125)
        logits = 0.125 * q @ k.T
        assert (bound >= logits - 1e-9).all()
        assert torch.allclose(bound[:, :16], logits[:, :16]), "the bound of equal keys is their logit"
