"""The benchmark of decode attention refuses to time what is wrong."""

from __future__ import annotations

import decode_gpu
import pytest
import torch
from decode_gpu import DELTA, EPSILON, UNREACHABLE, Case, WrongOutputError, checked, to_check, update_us
from gpu_case import by_head

from vattn_kernels import ops

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def case():
    case = Case(2, 4096, "in order")
    case.settle(UNREACHABLE, 0.1)
    return case


@pytest.fixture(scope="module")
def needles():
    """Sixteen populations of 32 heads; in each sixteen keys lie outside what keys span, so that codes miss them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_gpu, "BYTES_TO_ROTATE", 90 << 20)
        return Case(2, 32768, "in order")


@pytest.mark.parametrize(("epsilon", "cap"), [(UNREACHABLE, 0.05), (UNREACHABLE, 0.025), (EPSILON, 1.0)])
def test_a_stated_error_is_a_bound_where_codes_miss_what_heads_attend_to(needles, epsilon, cap, monkeypatch):
    """At most delta of the heads err by more than they state, in four draws of all of them.

    A rate of .09 is found with power .94 even if heads of a group, and all draws, err as one: 128 trials, where a rate
    of .02 fails by a chance of .02. Scales relative to a head's exact mass gave .10 and .12 at these caps, which that
    finds, and .04 at epsilon .05, which it does not.
    """
    monkeypatch.setattr(decode_gpu, "CHECKED", 16)
    assert needles.layers == 8 and to_check(needles) == (8, [0, 1])
    needles.settle(epsilon, cap)
    beyond = []
    for seed in range(4):
        needles.step["seed"] = seed
        beyond.append(checked(needles, lambda layer: needles.decode(layer, cap=cap), "ours", is_sampled=True)["beyond"])
    assert sum(beyond) / len(beyond) <= DELTA


@pytest.mark.parametrize("is_sampled", [True, False])
def test_right_outputs_pass(case, is_sampled):
    below = 0 if is_sampled else 1 << 30
    checked(case, lambda layer: case.decode(layer, cap=0.1, dense_below=below), "ours", is_sampled)


@pytest.mark.parametrize("is_sampled", [True, False])
@pytest.mark.parametrize(
    "spoil", [lambda out: out * 1.5, lambda out: out.index_fill(1, torch.tensor([3], device="cuda"), float("nan"))]
)
def test_wrong_outputs_are_refused(case, spoil, is_sampled):
    below = 0 if is_sampled else 1 << 30
    with pytest.raises(WrongOutputError, match="ours at 2x4096"):
        checked(case, lambda layer: spoil(case.decode(layer, cap=0.1, dense_below=below)), "ours", is_sampled)


def test_a_sample_that_states_too_much_is_refused(case):
    def zeros(layer):
        case.stats[..., ops.STATS.index("half_width")] = 1e3
        return torch.zeros_like(case.out)

    with pytest.raises(WrongOutputError, match=r"100\.0% of heads"):
        checked(case, zeros, "ours", is_sampled=True)


def test_a_right_sample_that_states_nothing_is_refused(case):
    right = [case.decode(layer, cap=0.1).clone() for layer in range(to_check(case)[0])]
    with pytest.raises(WrongOutputError, match="ours at 2x4096"):
        checked(case, right.__getitem__, "ours", is_sampled=True)


def test_one_kv_head_that_is_wrong_is_refused(case):
    def spoilt(layer):
        out = case.decode(layer, cap=0.1)
        out[:, :4] *= 2
        return out

    with pytest.raises(WrongOutputError, match="a KV head errs by"):
        checked(case, spoilt, "ours", is_sampled=True)


def test_a_scale_that_is_off_by_some_percent_is_refused(case):
    """Where the step states less than that."""
    case.settle(UNREACHABLE, 0.5)
    with pytest.raises(WrongOutputError, match="ours at 2x4096"):
        checked(case, lambda layer: 1.03 * case.decode(layer, cap=0.5), "ours", is_sampled=True)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_side_data_are_timed_if_they_are_those_of_a_whole_pool(batch, monkeypatch):
    monkeypatch.setattr(decode_gpu, "BYTES_TO_ROTATE", 1 << 20)
    case = Case(batch, 500, "interleaved")
    assert update_us(case) > 0
    right, last = case.side[1], case.kv_indices[-1, -1]
    # Codes, norms and valid byte of the last request's last token, of the last head where each has its own.
    for which in range(3):
        spoilt = [tensor.clone() for tensor in right]
        spoilt[which][(last, *[-1] * (spoilt[which].ndim - 1))] ^= 1
        case.side[1] = spoilt
        with pytest.raises(WrongOutputError, match="side data of layer 1 differ"):
            update_us(case)


def test_scores_by_other_tokens_codes_are_refused(case, monkeypatch):
    others = torch.randperm(case.k[0].shape[0], device="cuda")
    monkeypatch.setattr(case, "side", [(by_head(codes[others]), *rest) for codes, *rest in case.side])
    case.settle(UNREACHABLE, 0.5)
    with pytest.raises(WrongOutputError, match=r"knows no scores|of heads beyond"):
        checked(case, lambda layer: case.decode(layer, cap=0.5), "ours", is_sampled=True)


def test_a_step_that_states_more_than_epsilon_is_refused_where_that_is_to_hold(case):
    case.settle(UNREACHABLE, 0.1)
    with pytest.raises(WrongOutputError, match="is to hold"):
        checked(case, lambda layer: case.decode(layer, cap=0.1), "ours", is_sampled=True, is_certified=True)
    case.settle(EPSILON, 1.0)
    checked(case, lambda layer: case.decode(layer, cap=1.0), "ours", is_sampled=True, is_certified=True)
