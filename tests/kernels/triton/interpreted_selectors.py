"""The GPU kernels of selectors other than ``sketch`` in Triton's interpreter, against float64."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from interpreted import SINK, WINDOW, Step, by_head, few_programs  # noqa: F401

from vattn_kernels import ops, quantiles, signature
from vattn_kernels import triton as gpu
from vattn_kernels.reference import quest as reference_quest
from vattn_kernels.reference import rng
from vattn_kernels.reference import signature as reference_signature

SELECTORS = pytest.mark.parametrize("selector", ops.SELECTORS[1:])


class Shared(Step):
    """``hash`` with one net a KV head for the keys; its parent has one a query head."""

    def signatures(self, query_nets, key_nets, widths, angular):
        return super().signatures(query_nets, key_nets[: self.num_kv_heads].contiguous(), widths, angular)


class Deep(Step):
    """``hash`` with nets of three layers."""

    def hashed(self):
        g, sizes = torch.Generator().manual_seed(1), (self.head_dim, 96, 72, self.bits)
        pairs = list(itertools.pairwise(sizes))
        matrices = [torch.randn(self.num_qo_heads, i, o, generator=g) / i**0.5 for i, o in pairs]
        biases = [0.1 * torch.randn(self.num_qo_heads, o, generator=g) for _, o in pairs]
        nets, widths = signature.pack(matrices, biases)
        return self.signatures(nets, nets.clone(), widths, angular=False)


def agrees(case, log_scale, tolerance=1e-3):
    """Whether every row's list holds what the reference draws, with its probabilities."""
    case.learnt(log_scale)
    case.run()
    step = case.step
    for request in range(case.batch):
        for head in range(case.num_kv_heads):
            logits, slots = case.logits(request, head)
            inner = slots[SINK : case.context - WINDOW]
            fixed = torch.cat([logits[:, :SINK], logits[:, case.context - WINDOW :]], 1).logsumexp(1, keepdim=True)
            own = (case.estimated(request, head, inner) + log_scale - fixed).exp()
            if step["selector"] not in quantiles.COARSE_SELECTORS and step["target"] != "denominator":
                own *= case.v_cache[inner, head].double().norm(dim=-1)
            own = own.clamp(max=1)
            if case.side[2] is not None:
                own[:, case.side[2][inner] == 0] = 1
            pi = (own.amax(0) + step["floor"] * 100.0 / inner.numel()).clamp(max=1)
            key = rng.stream_key(step["seed"], step["layer_id"], head, case.context)
            u = rng.uniform(torch.arange(SINK, case.context - WINDOW), key)
            chosen, drawn_pi = case.lists(request, head)
            assert 0 < chosen.numel() < inner.numel() and chosen.unique().numel() == chosen.numel()
            where = {int(s): i for i, s in enumerate(inner)}
            index = torch.tensor([where[int(s)] for s in chosen])
            assert (drawn_pi / pi[index]).log().abs().max() < tolerance
            sure = (u < (1 - tolerance) * pi) | (pi >= 1)
            assert sure[index].sum() == sure.sum()
            assert not ((u > (1 + tolerance) * pi)[index]).any()
            surveyed = case.surveyed(request, head, lambda slots, where=where, own=own: own[:, [where[int(slots[0])]]])
            assert (case.asked(request, head) / surveyed).log().abs().max() < tolerance
            assert case.workspace().reads[
                request * case.num_kv_heads + head, : 4 * gpu.layout.splits_of(case.batch * case.num_kv_heads)
            ].sum() == pytest.approx(float(pi.sum()), rel=tolerance)


@pytest.mark.parametrize(
    ("kind", "selector", "bits"), [(Step, "sign", 32), (Step, "hash", 64), (Shared, "hash", 96), (Deep, "hash", 128)]
)
def test_signatures_are_the_references(kind, selector, bits):
    case = kind(batch=1, context=150, bits=bits, head_dim=96, settings={"selector": selector})
    k, _, mean, nets, widths, *_, centred = case.encode_arguments
    new = torch.randperm(k.shape[0])[:63]
    truth = [torch.zeros_like(t) for t in case.encode_arguments[5:8]]
    ours = [by_head(t) if t.dim() > 1 else t.clone() for t in truth]
    reference_signature.encode_signature(k, new, mean, nets, widths, *truth, centred)
    gpu.encode_signature(k, new, mean, nets, widths, *ours, centred)
    # A sign near zero may turn in float32.
    assert (signature.to_bits(truth[0]) != signature.to_bits(ours[0])).double().mean() < 1e-3
    assert (truth[1] != ours[1]).double().mean() < 0.02 and torch.equal(truth[2], ours[2])


@SELECTORS
@pytest.mark.parametrize(
    ("heads", "head_dim", "context"), [((4, 4), 64, 601), ((3, 1), 128, 655), ((8, 2), 96, 600), ((5, 1), 64, 593)]
)
def test_tokens_are_drawn_with_the_probability_of_their_score(selector, heads, head_dim, context):
    case = Step(
        batch=2, context=context, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, epsilon=0.9,
        settings={"selector": selector},
    )  # fmt: skip
    agrees(case, 1.5 if selector == "oracle" else 3.5)


@pytest.mark.parametrize("new", [[5], [3, 3, 40, 17, 3, 16, 16, 301, 299, 0], list(range(120, 303))])
def test_page_bounds_are_the_references(new):
    """Of slots in any order and more than once, in a cache whose last page is not whole."""
    case = Step(batch=1, context=296, num_qo_heads=3, num_kv_heads=3, head_dim=96, settings={"selector": "quest"})
    k, v, _, *side = case.encode_arguments
    truth = [torch.zeros_like(t) for t in side]
    ours = [by_head(t) if t.dim() > 1 else t.clone() for t in truth]
    # Slots 18 and 20 are encoded beforehand: their keys count in the bounds of what is added later.
    for slots in (torch.tensor([20, 18]), torch.tensor(new)):
        reference_quest.encode_pages(k, v, slots, *truth)
        gpu.encode_pages(k, v, slots, *ours)
    assert torch.equal(truth[0], ours[0]) and torch.equal(truth[2], ours[2])
    assert (truth[1] != ours[1]).double().mean() < 0.02


def owned(group, context, owner):
    """A step of heads that attend to tokens of their own, 20 nats above the others."""
    case = Step(
        batch=1, context=context, num_qo_heads=group, num_kv_heads=1,
        settings={"selector": "oracle", "floor": 0.01, "target": "denominator"},
    )  # fmt: skip
    logits = torch.randn(context, group, generator=torch.Generator().manual_seed(0)) - 20.0
    logits[torch.arange(context), owner] += 20.0
    logits[[*range(SINK), *range(context - WINDOW, context)]] += 10.0
    keys = torch.zeros(context, 1, case.head_dim)
    keys[:, 0, :group] = logits
    case.k_cache[case.kv_indices[0].long()] = keys
    case.q = torch.eye(group, case.head_dim)[None] * case.head_dim**0.5
    return case


def test_a_survey_leaves_no_list_out_where_there_are_more_than_it_asks(monkeypatch):
    """Each list holds every fourth run of 32 tokens: one head's lie all in the second ones."""
    monkeypatch.setattr(gpu.layout.LAUNCH, "programs", 64)
    context = SINK + WINDOW + 16 * gpu.layout.BLOCK
    position = torch.arange(context) - SINK
    owner = (position // gpu.layout.RUN.value % gpu.layout.LISTS.value == 1).long()
    case = owned(2, context, owner)
    assert gpu.layout.LISTS.value * gpu.layout.splits_of(1) > gpu.layout.surveyed(2)
    # One draw, of which nothing is left to make another.
    case.step["cap"] = 1e-3
    asked = []
    for n in range(context - 6, context):
        case.learnt(12.0)
        case.state[..., gpu.layout.STATE_CONTEXT.value] = n - 1
        case.seq_lens[:] = n
        case.run()
        asked.append(case.asked(0, 0))
    mean = torch.stack(asked).mean(0)
    # A quarter of the tokens; in six surveys of 64 a standard error is .022.
    assert abs(float(mean[1]) - 0.25) < 0.1 and abs(float(mean[0]) - 0.75) < 0.1


def test_sixteen_heads_that_attend_to_tokens_of_their_own_keep_to_a_cap():
    """None is raised for want of its tokens among those surveyed."""
    context, steps = 4096, 12
    owner = torch.randint(16, (context,), generator=torch.Generator().manual_seed(1))
    case = owned(16, context, owner)
    case.epsilon, case.step["cap"] = 1e-4, 0.05
    densities = []
    for step in range(steps):
        n = context - steps + step
        case.seq_lens[:], case.step["seed"] = n, step
        _, stats, _ = case.run()
        densities.append(float(stats[0, 0, 1]) / (n - SINK - WINDOW))
    # A request's first step reads everything, of which nothing is drawn.
    assert densities[0] == 0
    assert max(densities[3:]) < 0.07, densities


@pytest.mark.parametrize("bits", [32, 128])
@pytest.mark.parametrize(("kind", "selector"), [(Step, "sign"), (Step, "hash"), (Shared, "hash"), (Deep, "hash")])
def test_signatures_of_every_size_are_read(kind, selector, bits):
    case = kind(context=333, num_qo_heads=3, num_kv_heads=1, bits=bits, epsilon=0.9, settings={"selector": selector})
    agrees(case, 1.5 if selector == "oracle" else 3.5)


@SELECTORS
@pytest.mark.parametrize("target", ["output", "sdpa"])
def test_a_sampled_step_is_within_epsilon(selector, target):
    case = Step(batch=1, context=700, epsilon=0.2, settings={"selector": selector, "target": target})
    out, stats, _ = case.run()
    assert case.errors(out).max() < 2e-5
    for _ in range(3):
        out, stats, _ = case.run()
    assert (stats[..., 3] == ops.OUTCOMES.index("certified")).all() and (stats[..., 2] <= 0.2).all()
    if target == "output":
        assert case.errors(out).max() < 0.2


@SELECTORS
def test_what_is_open_draws_again_and_then_reads_everything(selector):
    case = Step(context=500, epsilon=1e-6, settings={"selector": selector})
    case.learnt(-3.0)
    out, stats, _ = case.run()
    assert case.errors(out).max() < 2e-5
    assert (stats[..., 0] == 1).all() and (stats[..., 3] == ops.OUTCOMES.index("certified")).all()


@pytest.mark.parametrize("selector", ["quest", "sign", "hash"])
def test_slots_that_are_not_valid_are_read_for_certain(selector):
    case = Step(context=600, epsilon=0.9, settings={"selector": selector})
    chosen = case.kv_indices[:, 100:140].long()
    case.side[2][chosen] = 0
    agrees(case, 2.0)


def test_what_is_missing_or_misshapen_is_named():
    case = Step(context=100, settings={"selector": "sign"})
    good = case.side
    for i, name in ((0, "codes"), (2, "valid"), (4, "query_basis"), (6, "fields")):
        case.side = tuple(None if j == i else t for j, t in enumerate(good))
        with pytest.raises(ValueError, match=name):
            case.run()
    for i, wrong, message in (
        (6, good[6] * 2, "nets take 128 inputs"),
        (6, good[6].to("meta"), "keep them on a CPU"),
        (1, good[1].contiguous(), "norms must lie by head"),
        (0, good[0].repeat(1, 1, 2), "one signature a KV head, or one a query head"),
        (4, good[4][:2].contiguous(), "2 query nets for 6 query heads"),
    ):
        case.side = (*good[:i], wrong, *good[i + 1 :])
        with pytest.raises(ValueError, match=message):
            case.run()


def test_exact_scores_need_no_side_data_and_ignore_it():
    case, given = (Step(context=400, epsilon=0.9, settings={"selector": s}) for s in ("oracle", "hash"))
    agrees(case, 1.5)
    expected = case.lists(1, 0)
    case.side = given.side
    case.learnt(1.5)
    case.run()
    assert all(torch.equal(a, b) for a, b in zip(case.lists(1, 0), expected, strict=True))
