"""The GPU kernels in Triton's interpreter, against float64; run by ``test_interpreter.py`` in a process of its own."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.interpreter import InterpretedFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
from decode_case import (
    EDGES,
    ENCODER_MISFITS,
    ENCODERS,
    FP8,
    MISFITS,
    OFFSETS,
    SELECTOR_MISFITS,
    SINK,
    WINDOW,
    WRONG_SETTINGS,
    DecodeCase,
    changed,
)

from vattn_kernels import ops, params, sketch
from vattn_kernels import triton as gpu
from vattn_kernels.reference import rng
from vattn_kernels.reference import sketch as reference
from vattn_kernels.triton import layout
from vattn_kernels.triton.combine import MOST_GROWTH

LAUNCH_ARGUMENTS = {"grid", "warmup", *inspect.signature(CUDAOptions).parameters}
HEADS = [(4, 2), (3, 1), (2, 2), (5, 1)]


def by_head(side):
    """A copy whose rows of a head lie side by side, as the GPU kernels read them."""
    return side.transpose(0, 1).contiguous().transpose(0, 1)


@dataclasses.dataclass
class Step(DecodeCase):
    """A case of `decode_case` with the state that the GPU kernels keep, and few programs: each one is interpreted."""

    def __post_init__(self):
        self.settings, self.lanes = {"selector": "sketch", "floor": 0.02} | self.settings, True
        super().__post_init__()
        self.side = (*(None if t is None else by_head(t) for t in self.side[:2]), *self.side[2:])
        self.state = torch.zeros(self.batch + 1, self.num_qo_heads, ops.STATE_WIDTH)
        self.state_rows = torch.arange(self.batch).flip(0)

    def run(self):
        arguments = self.arguments()
        gpu.decode(*arguments, **self.step, state=self.state, state_rows=self.state_rows)
        return arguments[-4], arguments[-3], arguments[-2]

    def learnt(self, log_scale):
        """Set what the last step learnt, relative to the log-sum-exp of the fixed set."""
        self.state[..., layout.STATE_SCALE.value] = log_scale
        self.state[..., layout.STATE_CONTEXT.value] = self.context - 1
        self.state[..., layout.STATE_READS.value] = 100.0

    def logits(self, request, head):
        slots = self.kv_indices[request, : self.context].long()
        group = self.num_qo_heads // self.num_kv_heads
        q = self.q[request, head * group : (head + 1) * group].double()
        return self.step["sm_scale"] * q @ self.k_cache[slots, head].double().T, slots

    def workspace(self):
        return layout.workspace(
            self.q.device, self.batch, self.context, self.num_qo_heads, self.num_kv_heads,
            1 << (self.head_dim - 1).bit_length(),
        )  # fmt: skip

    def each_list(self, request, head):
        """Slots and inclusion probabilities of each list that the last call made of a row."""
        work, rows = self.workspace(), self.batch * self.num_kv_heads
        row, capacity = request * self.num_kv_heads + head, layout.capacity(rows, self.context)
        lists = layout.LISTS.value * layout.splits_of(rows)
        for s in range(lists):
            at = row * capacity + s * (capacity // lists)
            entries = work.entries[at : at + int(work.counts[row, s])]
            yield entries[:, 0].long(), entries[:, 1].view(torch.float32).double()

    def lists(self, request, head):
        """Slots and inclusion probabilities that the last call selected for a row."""
        slots, pi = zip(*self.each_list(request, head), strict=True)
        return torch.cat(slots), torch.cat(pi)

    def expected(self, request, head):
        """Tokens that a row's lists are expected to hold."""
        row, lists = request * self.num_kv_heads + head, len(list(self.each_list(request, head)))
        return float(self.workspace().reads[row, :lists].sum())

    def asked(self, request, head):
        """Share of the reads that each head of a row asks for, by the last call's survey, if it drew once."""
        row, group = request * self.num_kv_heads + head, self.num_qo_heads // self.num_kv_heads
        asked = self.workspace().asked[row * group : (row + 1) * group].double()
        return asked / self.expected(request, head)

    def surveyed(self, request, head, own):
        """The same from its lists, if ``own`` gives each head's probabilities of slots ``[group, n]`` in float64."""
        lists = list(self.each_list(request, head))
        number = layout.surveyed(self.num_qo_heads // self.num_kv_heads)
        u = rng.uniform(torch.arange(number), self.context)
        asked = tokens = 0
        for i, x in enumerate(u.tolist()):
            slots, pi = lists[i * len(lists) // number]
            if slots.numel():
                place = int(x * slots.numel())
                asked = asked + slots.numel() * own(slots[place : place + 1])[:, 0] / pi[place]
                tokens += slots.numel()
        return asked / tokens


def with_fp8_cache(dtype, k_scale, v_scale, **options):
    """A case with a scaled fp8 cache, and the same with a float32 cache that holds what the first one stands for."""
    fp8, plain = Step(**options), Step(**options)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    for name, scale in zip(("k_cache", "v_cache"), scales.values(), strict=True):
        stored = (getattr(plain, name) / scale).to(dtype)
        setattr(fp8, name, stored)
        setattr(plain, name, stored.float() * scale)
    slots = torch.arange(plain.k_cache.shape[0])
    for case, given in ((fp8, scales), (plain, {})):
        gpu.encode(case.k_cache, case.v_cache, slots, *case.encode_arguments[3:7], *case.side[:3], **given)
    fp8.step |= scales
    return fp8, plain


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each one is interpreted; and arguments that a compiled kernel would refuse are refused."""
    monkeypatch.setattr(layout.LAUNCH, "programs", 8)
    monkeypatch.setattr(layout.LAUNCH, "tail_items", 6)
    run = InterpretedFunction.run

    def checked(kernel, *args, **given):
        unknown = given.keys() - {*kernel.arg_names, *LAUNCH_ARGUMENTS}
        assert not unknown, f"{kernel.fn.__name__} takes no {unknown}"
        waits = "p_barrier" in kernel.arg_names
        assert waits == given.get("launch_cooperative_grid", False), "programs that wait for each other must all run"
        return run(kernel, *args, **given)

    monkeypatch.setattr(InterpretedFunction, "run", checked)


@pytest.mark.parametrize("bits", [32, 64, 128])
@pytest.mark.parametrize("slots", [1, 63, 111])
def test_codes_are_the_references(slots, bits):
    case = Step(batch=1, context=200, bits=bits, head_dim=64)
    k, v, _, *tables = case.encode_arguments[:7]
    new = torch.randperm(k.shape[0])[:slots]
    truth = [torch.zeros_like(t) for t in case.encode_arguments[7:]]
    ours = [by_head(t) if t.dim() > 1 else t.clone() for t in truth]
    reference.encode(k, v, new, *tables, *truth)
    gpu.encode(k, v, new, *tables, *ours)
    for a, b in zip(truth, ours, strict=True):
        # A code at a quantizer's border may round to its neighbour in float32.
        assert (a[new] != b[new]).double().mean() < 0.01
        untouched = torch.ones(k.shape[0], dtype=torch.bool)
        untouched[new] = False
        assert not b[untouched].any()


def test_one_launch_codes_every_layer():
    cases = [Step(batch=1, context=200, bits=64, head_dim=64, seed=seed) for seed in range(3)]
    new = torch.tensor([0, 3, 199])
    tables = [torch.stack(one) for one in zip(*(case.encode_arguments[3:7] for case in cases), strict=True)]
    kv = list(zip(*(case.encode_arguments[:2] for case in cases), strict=True))
    side = [
        torch.zeros(3, *(t.shape[1], t.shape[0], *t.shape[2:]) if t.dim() > 1 else t.shape, dtype=t.dtype)
        for t in cases[0].encode_arguments[7:]
    ]
    side = [t.transpose(1, 2) if t.dim() > 2 else t for t in side]
    gpu.encode_layers(list(kv[0]), list(kv[1]), new, *tables, *side)
    for layer, case in enumerate(cases):
        alone = [torch.zeros_like(t[layer]) for t in side]
        gpu.encode(*case.encode_arguments[:2], new, *case.encode_arguments[3:7], *alone)
        assert all(torch.equal(a, t[layer]) for a, t in zip(alone, side, strict=True))
        assert alone[2].sum() == 3


@pytest.mark.parametrize(("dtype", "k_scale", "v_scale"), FP8)
def test_a_scaled_fp8_cache_is_coded_as_what_it_stands_for(dtype, k_scale, v_scale):
    fp8, plain = with_fp8_cache(dtype, k_scale, v_scale, batch=1, context=200)
    assert all(torch.equal(a, b) for a, b in zip(fp8.side[:3], plain.side[:3], strict=True))
    new = torch.arange(0, 200, 3)
    tables = [torch.stack([t, t]) for t in fp8.encode_arguments[3:7]]
    codes, norms = (torch.stack([t.transpose(0, 1)] * 2).zero_().transpose(1, 2) for t in fp8.side[:2])
    side = [codes, norms, torch.stack([fp8.side[2]] * 2).zero_()]
    pools = [fp8.k_cache] * 2, [fp8.v_cache] * 2
    gpu.encode_layers(*pools, new, *tables, *side, k_scales=[k_scale, 1.0], v_scales=[v_scale, 1.0])
    for layer, scales in enumerate(({"k_scale": k_scale, "v_scale": v_scale}, {})):
        alone = [torch.zeros_like(t[layer]) for t in side]
        gpu.encode(fp8.k_cache, fp8.v_cache, new, *(t[layer] for t in tables), *alone, **scales)
        assert all(torch.equal(a, t[layer]) for a, t in zip(alone, side, strict=True))
    assert not torch.equal(side[0][0], side[0][1])


@pytest.mark.parametrize(("dtype", "k_scale", "v_scale"), FP8)
def test_a_scaled_fp8_cache_read_whole_is_what_it_stands_for(dtype, k_scale, v_scale):
    fp8, plain = with_fp8_cache(dtype, k_scale, v_scale, context=111, num_qo_heads=4)
    out, stats, _ = fp8.run()
    assert plain.errors(out).max() < 2e-5
    assert (stats[..., 3] == ops.OUTCOMES.index("dense")).all()
    plain.run()
    torch.testing.assert_close(fp8.state, plain.state)


@pytest.mark.parametrize(("dtype", "k_scale", "v_scale"), FP8)
@pytest.mark.parametrize(("target", "log_scale"), [("output", 2.0), ("output", -3.0), ("sdpa", 2.0)])
def test_a_scaled_fp8_cache_is_sampled_as_what_it_stands_for(dtype, k_scale, v_scale, target, log_scale):
    settings = {"target": target, "audit_rate": 1.0}
    fp8, plain = with_fp8_cache(dtype, k_scale, v_scale, context=400, num_qo_heads=4, settings=settings)
    results = []
    for case in (fp8, plain):
        case.learnt(log_scale)
        result = case.run()
        listed = [t for r in range(case.batch) for h in range(case.num_kv_heads) for t in case.lists(r, h)]
        results.append((*result, listed))
    (out, stats, counters, listed), (expected_out, expected_stats, expected_counters, expected) = results
    assert all(torch.equal(a, b) for a, b in zip(listed, expected, strict=True))
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(counters, expected_counters)
    torch.testing.assert_close(fp8.state, plain.state, rtol=1e-4, atol=1e-4)
    assert (stats[..., 3] == ops.OUTCOMES.index("certified")).all()
    if target == "output":
        assert plain.errors(out).max() < fp8.epsilon


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("context", [1, 63, 80, 111])
def test_first_step_of_a_request_is_exact_and_starts_the_state(context, heads):
    case = Step(batch=2, context=context, num_qo_heads=heads[0], num_kv_heads=heads[1])
    case.seq_lens[1] = 0
    out, stats, counters = case.run()
    assert case.errors(out)[0].max() < 2e-5
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (stats[..., 3] == ops.OUTCOMES.index("dense")).all()
    # A row of one token is padding, of which nothing is learnt.
    counted = context if context > 1 else 0
    assert counters[OFFSETS[0]] == counters[OFFSETS[1] + 4] == heads[0] * counted
    assert (case.state[case.state_rows[0], :, layout.STATE_CONTEXT.value] == counted).all()
    assert not case.state[case.state_rows[1]].any()


@pytest.mark.parametrize(("bits", "seed"), [(64, 0), (128, 0), (64, 2**32 - 7)])
def test_tokens_are_drawn_with_the_probability_of_their_score(bits, seed):
    case = Step(batch=2, context=600, bits=bits, epsilon=0.5, settings={"seed": seed})
    case.learnt(4.0)
    case.run()
    step, group = case.step, case.num_qo_heads // case.num_kv_heads
    for request in range(case.batch):
        for head in range(case.num_kv_heads):
            logits, slots = case.logits(request, head)
            inner = slots[SINK : case.context - WINDOW]
            side = (case.side[0][inner, head], case.side[1][inner, head], case.side[3][head])
            q = case.q[request, head * group : (head + 1) * group].double()
            estimated, _ = reference.logits(q, *side, *(t[head] for t in case.side[4:]), step["sm_scale"])
            fixed = torch.cat([logits[:, :SINK], logits[:, case.context - WINDOW :]], 1).logsumexp(1, keepdim=True)
            coded = 4 * sketch.GROUPS_PER_WORD * bits // 32
            t = q @ case.side[4][head].double()[:, :coded]
            kappa = 0.5 * step["sm_scale"] ** 2 * t.square().sum() / (group * (1 << (coded - 1).bit_length()))
            error, norm = (reference.norm_of(side[1][:, i]) for i in (0, 1))
            scores = (estimated + 4.0 - fixed).exp() * (kappa * error**2).exp() * norm
            pi = (scores.amax(0) + step["floor"] * 100.0 / inner.numel()).clamp(max=1)
            key = rng.stream_key(step["seed"], step["layer_id"], head, case.context)
            u = rng.uniform(torch.arange(SINK, case.context - WINDOW), key)
            chosen, drawn_pi = case.lists(request, head)
            assert chosen.unique().numel() == chosen.numel()
            where = {int(s): i for i, s in enumerate(inner)}
            index = torch.tensor([where[int(s)] for s in chosen])
            # The query's weights are rounded to int8.
            assert (drawn_pi / pi[index]).log().abs().max() < 0.12
            sure = (u < 0.88 * pi) | (pi >= 1)
            assert sure[index].sum() == sure.sum()
            assert not ((u > 1.13 * pi)[index]).any()
            own = scores.clamp(max=1)
            surveyed = case.surveyed(request, head, lambda slots, where=where, own=own: own[:, [where[int(slots[0])]]])
            assert (case.asked(request, head) / surveyed).log().abs().max() < 0.12
            assert 1 - step["floor"] < float(surveyed.sum()) < group and surveyed.min() < 0.9 * surveyed.max()


def without_one_head(epsilon, cap, log_scale):
    """A step whose second head's scores lie 40 nats lower, as where a scale is relative to a mass that codes miss."""
    settings = {"cap": cap}
    case = Step(batch=1, context=1000, num_qo_heads=3, num_kv_heads=1, epsilon=epsilon, settings=settings)
    case.learnt(log_scale)
    case.state[..., 1, layout.STATE_SCALE.value] -= 40.0
    return case


def test_a_head_whose_codes_miss_what_it_attends_to_comes_to_its_share():
    case = without_one_head(1e-6, 0.2, 4.0)
    least, most = 1 / (3 * layout.SHARES.value), 0.2 * (case.context - SINK - WINDOW)
    case.run()
    asked, reads = case.asked(0, 0), case.expected(0, 0)
    assert asked[1] < 1e-6 * least < least < min(asked[0], asked[2])
    # A survey may see nothing of a head by chance, so that a step raises it no further than any other need does.
    gained = float(asked[1]) * (math.exp(MOST_GROWTH.value) - 1)
    moved = case.state[case.state_rows[0], :, layout.STATE_SCALE.value] - torch.tensor([4.0, -36.0, 4.0])
    limit = math.log(most / reads / (1 + gained))
    torch.testing.assert_close(moved, torch.tensor([limit, limit + MOST_GROWTH.value, limit]), rtol=0, atol=1e-3)
    for _ in range(16):
        _, stats, _ = case.run()
    asked = case.asked(0, 0)
    assert 0.5 * least < asked[1] < 3 * least and least < min(asked[0], asked[2])
    # The cap made room for it.
    assert 0.75 * most < stats[0, 0, 1] < 1.25 * most


def test_the_cap_makes_room_for_what_a_head_lacks():
    case = without_one_head(1e-6, 0.2, 4.0)
    # So far below the least share that one step closes it.
    case.state[..., 1, layout.STATE_SCALE.value] += 34.0
    case.run()
    least, most = 1 / (3 * layout.SHARES.value), 0.2 * (case.context - SINK - WINDOW)
    asked, reads = case.asked(0, 0), case.expected(0, 0)
    lacks = math.log(least / float(asked[1]))
    assert 0.5 < lacks < MOST_GROWTH.value
    limit = math.log(most / reads / (1 + least - float(asked[1])))
    moved = case.state[case.state_rows[0], :, layout.STATE_SCALE.value] - torch.tensor([4.0, -2.0, 4.0])
    torch.testing.assert_close(moved, torch.tensor([limit, limit + lacks, limit]), rtol=0, atol=1e-3)


def test_a_second_draw_goes_by_what_the_first_surveyed():
    """Which asked for less than the second does, by what scales grew between them."""
    # The one's cap leaves nothing for another draw.
    first, case = without_one_head(0.9, 1e-3, 0.0), without_one_head(0.05, 0.9, 0.0)
    begun = case.state[case.state_rows[0]].clone()
    first.run()
    alone = first.workspace().asked[:3].clone()
    case.run()
    work, row = case.workspace(), case.state[case.state_rows[0]]
    grown = work.log_scale[:3] + work.fixed[:3] - begun[:, layout.STATE_SCALE.value]
    assert (grown > 0.1).all()
    torch.testing.assert_close(work.asked[:3], alone * grown.exp(), rtol=1e-3, atol=0)
    least = row[0, layout.STATE_READS.value] / (3 * layout.SHARES.value)
    lacks = (least / work.asked[:3]).log().clamp(min=0, max=MOST_GROWTH.value)
    assert lacks[1] == MOST_GROWTH.value
    assert row[1, layout.STATE_SCALE.value] >= begun[1, layout.STATE_SCALE.value] + grown[1] + lacks[1] - 1e-3


def test_where_nothing_is_listed_no_head_lacks():
    case = Step(context=600, num_qo_heads=2, num_kv_heads=1, epsilon=0.9, settings={"cap": 1e-3, "floor": 1e-9})
    case.learnt(-90.0)
    case.state[..., layout.STATE_READS.value] = 0.0
    case.run()
    assert not case.workspace().counts[:2].any()
    assert (case.workspace().asked[:4] == 1).all()


@pytest.mark.parametrize("target", ops.TARGETS)
@pytest.mark.parametrize("heads", HEADS[:2])
def test_estimate_and_half_width_follow_from_what_was_read(target, heads):
    case = Step(context=500, num_qo_heads=heads[0], num_kv_heads=heads[1], epsilon=0.9, settings={"target": target})
    case.learnt(3.0)
    out, stats, counters = case.run()
    row = params.pack(case.epsilon, case.delta, case.bound)
    group = heads[0] // heads[1]
    table = params.SPLIT_TABLE if target == "sdpa" else params.TABLE
    for request in range(case.batch):
        for head in range(heads[1]):
            logits, slots = case.logits(request, head)
            chosen, pi = case.lists(request, head)
            fixed = torch.cat([slots[:SINK], slots[case.context - WINDOW :]])
            read, weight = torch.cat([fixed, chosen]), torch.cat([torch.ones(SINK + WINDOW).double(), 1 / pi])
            position = {int(s): i for i, s in enumerate(slots)}
            index = torch.tensor([position[int(s)] for s in read])
            v = case.v_cache[read, head].double()
            for g in range(group):
                y = (logits[g, index] - logits[g, index].max()).exp()
                mass = weight @ y
                o = (weight * y) @ v / mass
                assert (out[request, head * group + g].double() - o).norm() / o.norm() < 2e-5
                a = weight * (weight - 1) * y.square()

                def width(part, unit, a=a, weight=weight):
                    spread = (a.square() * (1 - 1 / weight)).sum() / a.sum() ** 2
                    x = min(float(spread) / 2 * params.TABLE_STEPS_PER_UNIT, params.TABLE_POINTS - 1)
                    j = min(int(x), params.TABLE_POINTS - 2)
                    z = row[table + j] + (x - j) * (row[table + j + 1] - row[table + j])
                    return z * float((a * part).sum().sqrt() / unit)

                widths = {
                    "output": width((v - o).square().sum(1), mass * o.norm()),
                    "denominator": width(torch.ones_like(a), mass),
                    "numerator": width(v.square().sum(1), mass * o.norm()),
                }
                widths["sdpa"] = 2 * (widths["denominator"] + widths["numerator"])
                line = stats[request, head * group + g]
                assert abs(float(line[2]) / widths[target] - 1) < 1e-3
                assert line[1] == chosen.numel() and line[4] == chosen.numel() + SINK + WINDOW
                assert abs(float(line[5]) - float(1 - y[: fixed.numel()].sum() / mass)) < 1e-4
    assert counters[OFFSETS[0]] == case.context * case.batch * heads[0]
    assert counters[OFFSETS[1] : OFFSETS[1] + 5].sum() == stats[..., 4].double().sum()
    assert counters[OFFSETS[3] + 1 : OFFSETS[4]].sum() == case.batch * heads[0]


def test_an_open_group_draws_again_and_then_reads_everything():
    case = Step(context=500, epsilon=0.05)
    case.learnt(-3.0)
    out, stats, _ = case.run()
    assert torch.isfinite(out).all() and torch.isfinite(stats).all()
    assert (stats[..., 3] == ops.OUTCOMES.index("certified")).all()
    assert case.errors(out).max() < 0.05
    case = Step(context=500, epsilon=1e-6)
    case.learnt(-3.0)
    out, stats, _ = case.run()
    assert case.errors(out).max() < 2e-5
    assert (stats[..., 0] == 1).all() and (stats[..., 2] == 0).all()
    assert (stats[..., 3] == ops.OUTCOMES.index("certified")).all()


@pytest.mark.parametrize(("cap", "outcome"), [(1.0, "certified"), (0.5, "capped")])
def test_rows_that_draw_again_and_rows_that_are_read_whole_share_a_launch(cap, outcome):
    case = Step(context=500, epsilon=1e-6, settings={"cap": cap})
    case.learnt(1.0)
    case.state[case.state_rows[1]] = 0.0
    out, stats, counters = case.run()
    errors = case.errors(out)
    assert (stats[0, :, 3] == ops.OUTCOMES.index(outcome)).all() and (
        stats[1, :, 3] == ops.OUTCOMES.index("dense")
    ).all()
    assert errors[1].max() < 2e-5
    assert errors[0].max() < (2e-5 if cap == 1 else 0.5)
    if cap < 1:
        assert (stats[0, :, 0] > 0.4).all() and (stats[0, :, 0] < 0.7).all()
    counted = dict(zip(ops.OUTCOMES, counters[OFFSETS[2] : OFFSETS[3]].tolist(), strict=True))
    assert counted == dict.fromkeys(ops.OUTCOMES, 0) | {outcome: case.num_qo_heads, "dense": case.num_qo_heads}


@pytest.mark.parametrize("heads", HEADS)
def test_a_padded_row_leaves_nothing_to_finish(heads):
    case = Step(batch=3, context=500, num_qo_heads=heads[0], num_kv_heads=heads[1], epsilon=0.9)
    case.learnt(2.0)
    case.state[case.state_rows[1]] = 0.0
    case.seq_lens[1] = 1
    used = case.workspace().used.fill_(-1)
    out, stats, counters = case.run()
    assert used == -1
    # Its row of state may be another's.
    assert not case.state[case.state_rows[1]].any() and torch.isfinite(case.state).all()
    first = case.v_cache[case.kv_indices[1, 0].long()].repeat_interleave(heads[0] // heads[1], 0)
    torch.testing.assert_close(out[1], first, rtol=1e-5, atol=1e-6)
    assert (stats[1, :, 0] == 1).all() and (stats[1, :, 3] == ops.OUTCOMES.index("dense")).all()
    assert counters[OFFSETS[2] : OFFSETS[3]].sum() == 2 * heads[0]


@pytest.mark.parametrize("heads", HEADS)
def test_an_audit_counts_the_true_errors(heads):
    # What the cap cuts violates epsilon here and there.
    case = Step(
        batch=3, context=500, num_qo_heads=heads[0], num_kv_heads=heads[1], epsilon=0.02, settings={"cap": 0.15}
    )
    case.seq_lens[1] = 0
    case.learnt(-1.0)
    plain = case.run()
    assert not plain[2][OFFSETS[5] :].any()
    case.learnt(-1.0)
    case.step["audit_rate"] = 1.0
    out, stats, counters = case.run()
    assert torch.equal(out, plain[0]) and torch.equal(stats, plain[1])
    assert torch.equal(counters[: OFFSETS[5]], plain[2][: OFFSETS[5]])
    errors = case.errors(out)[[0, 2]].flatten()
    violations = int((errors > 0.02).sum())
    assert violations > 0
    assert counters[OFFSETS[5] : OFFSETS[5] + 2].tolist() == [errors.numel(), violations]
    assert abs(float(counters[OFFSETS[6]]) - float(errors.sum())) < 1e-4 * errors.numel()
    buckets = torch.bucketize(errors, EDGES.double()).bincount(minlength=len(EDGES) + 1)
    assert torch.equal(counters[OFFSETS[6] + 1 :], buckets.double())


def test_audits_keep_to_their_rate_and_leave_out_what_was_read_whole():
    case = Step(batch=40, context=200, num_qo_heads=2, num_kv_heads=2, epsilon=0.9, settings={"audit_rate": 0.25})
    case.learnt(0.0)
    case.state[case.state_rows[:20]] = 0.0
    assert 2 <= case.run()[2][OFFSETS[5]] <= 20


def test_the_cap_holds_from_step_to_step():
    case = Step(context=1000, epsilon=1e-4, settings={"cap": 0.2})
    for _ in range(8):
        out, stats, _ = case.run()
    assert torch.isfinite(out).all()
    assert (stats[..., 3] == ops.OUTCOMES.index("capped")).all()
    assert 0.15 < float(stats[..., 1].mean()) / (case.context - SINK - WINDOW) < 0.25


def test_unusable_slots_are_read_for_certain():
    case = Step(context=600, epsilon=0.9)
    case.learnt(-6.0)
    chosen = case.kv_indices[:, 100:140].long()
    case.side[1][chosen, :, 0] = sketch.UNUSABLE
    case.run()
    for request in range(case.batch):
        for head in range(case.num_kv_heads):
            slots, pi = case.lists(request, head)
            found = torch.isin(slots, chosen[request])
            assert found.sum() == chosen.shape[1] and (pi[found] == 1).all() and slots.numel() < 400


def test_the_scale_counts_where_all_scores_are_equal():
    """As with dummy weights: the unit of a score is then tiny, and the scale is given in that unit."""
    case = Step(context=1000, epsilon=1e-4, settings={"cap": 0.2})
    case.q *= 1e-9
    for _ in range(4):
        _, stats, _ = case.run()
    assert 0.15 < float(stats[..., 1].mean()) / (case.context - SINK - WINDOW) < 0.25


def test_a_workspace_that_became_too_small_is_kept():
    """For a graph may have been captured on it."""
    layout._workspaces.clear()
    small, _ = Step(context=100).workspace(), Step(context=900, num_qo_heads=8).workspace()
    assert any(kept is small for kept in layout._outgrown)


def test_two_runs_give_equal_bits():
    case = Step(context=600)
    case.learnt(2.0)
    before = case.state.clone()
    first = case.run()
    case.state.copy_(before)
    assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))


def test_what_cannot_run_is_named():
    case = Step(context=100)
    for setting, value in {"sampler": "unknown", "selector": "unknown", "group_score": "mean"}.items():
        with pytest.raises(ValueError, match=setting):
            gpu.decode(
                *case.arguments(), **(case.step | {setting: value}), state=case.state, state_rows=case.state_rows
            )
    with pytest.raises(ValueError, match="state"):
        gpu.decode(*case.arguments(), **case.step)


GPU_MISFITS = [
    ("codes", lambda codes: codes.contiguous()),
    ("codes", lambda codes: torch.cat([codes, codes[..., :1]], 2)),
    ("query_basis", lambda basis: basis.transpose(1, 2)),
]


@pytest.mark.parametrize(("name", "change"), MISFITS + GPU_MISFITS)
def test_arguments_that_do_not_fit_are_named(name, change):
    case = Step(context=100)
    with pytest.raises(ValueError, match=f"vattn: {name} "):
        gpu.decode(*case.misfit(name, change), **case.step, state=case.state, state_rows=case.state_rows)


@pytest.mark.parametrize(("name", "value"), WRONG_SETTINGS)
def test_wrong_settings_are_named(name, value):
    case = Step(context=100)
    case.step[name] = value
    with pytest.raises(ValueError, match=f"vattn: .*{name} {value}"):
        gpu.decode(*case.arguments(), **case.step, state=case.state, state_rows=case.state_rows)


@pytest.mark.parametrize(("selector", "name", "change", "named"), SELECTOR_MISFITS)
def test_side_data_that_do_not_fit_are_named(selector, name, change, named):
    case = Step(context=100, settings={"selector": selector})
    with pytest.raises(ValueError, match=f"vattn: {named} "):
        gpu.decode(*case.misfit(name, change), **case.step, state=case.state, state_rows=case.state_rows)


@pytest.mark.parametrize(("selector", "name", "change", "named"), ENCODER_MISFITS)
def test_what_an_encoder_cannot_write_is_named(selector, name, change, named):
    case = Step(context=100, settings={"selector": selector})
    case.encode_arguments = changed(ENCODERS[selector], case.encode_arguments, {"codes": by_head, "norms": by_head})
    with pytest.raises(ValueError, match=f"vattn: {named} "):
        getattr(gpu, ENCODERS[selector])(*case.encoder_misfit(name, change))


def test_fewer_fields_than_the_words_hold_are_named():
    case = Step(context=100)
    *side, steps, fields = case.side
    case.side = (*side, steps[:, :20].contiguous(), fields[:, :20].contiguous())
    with pytest.raises(ValueError, match="steps and fields of 20 dimensions, 2 words take 24"):
        case.run()


def test_layers_that_do_not_fit_each_other_are_named():
    case = Step(context=100)
    moved = changed(ENCODERS["sketch"], case.encode_arguments, {"codes": by_head, "norms": by_head})
    k, v, slots, *one = moved
    two = [torch.stack([t, t]) for t in one]
    for caches, side, named in (
        ([k, k], [t[None] for t in one], "codes"),
        ([k, k[:-1]], two, "KV caches"),
        ([k, k.bfloat16()], two, "KV caches"),
    ):
        with pytest.raises(ValueError, match=f"vattn: {named} "):
            gpu.encode_layers(caches, caches, slots, *side)
    with pytest.raises(ValueError, match="vattn: 2 K caches and 1 V caches"):
        gpu.encode_layers([k, k], [v], slots, *two)
    with pytest.raises(ValueError, match="vattn: v_scales of 1 layers"):
        gpu.encode_layers([k, k], [v, v], slots, *two, v_scales=[1.0])


@pytest.mark.parametrize(
    "change", [{"state": lambda state: state[..., :3]}, {"state": lambda state: state.double()},
               {"state_rows": lambda rows: rows.int()}, {"state_rows": lambda rows: rows[:1]}],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_named(change):
    case = Step(context=100)
    ((name, wrong),) = change.items()
    state = {"state": case.state, "state_rows": case.state_rows}
    with pytest.raises(ValueError, match=f"vattn: {name} "):
        gpu.decode(*case.arguments(), **case.step, **(state | {name: wrong(state[name])}))


@pytest.mark.parametrize("selector", ["sketch", "oracle"])
def test_signals_between_launches_change_nothing_and_are_cleared(selector, monkeypatch):
    case = Step(batch=2, context=700, epsilon=0.3, settings={"selector": selector})
    case.learnt(1.0)
    # One request is read whole; stale signals, as of a step that broke off, must not count.
    case.state[case.state_rows[1], :, layout.STATE_CONTEXT.value] = 0
    before = case.state.clone()
    expected = case.run()
    case.state.copy_(before)
    work = case.workspace()
    work.listed.fill_(7)
    work.attended.fill_(7)
    # All but the start of a launch while the one ahead runs, which the interpreter has not.
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(layout, name, lambda: None)
    monkeypatch.setattr(layout, "launches_overlap", lambda device: True)
    found = case.run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    rows, splits = 2 * case.num_kv_heads, layout.splits_of(2 * case.num_kv_heads)
    assert (work.listed[:rows, :splits] == 1).all() and not work.listed[:rows, splits:].any()
    assert (work.attended[:rows] == splits + 1).all()
