"""Staged parameters: checked on the host, applied between batches, at a fixed address."""

from __future__ import annotations

import pytest
import torch

from vattn_kernels import dimensions, params
from vattn_sgl import control
from vattn_sgl.config import LEAST_DELTA, ConfigError, PatchError, Settings

NUM_LAYERS = 5


def row(epsilon, delta, bound="f8", dims=dimensions.MOST):
    return torch.tensor(params.pack(epsilon, delta, bound, dims))


def test_nothing_changes_before_apply_and_the_address_stays():
    c = control.RuntimeControl(Settings(), NUM_LAYERS, "cpu")
    address = c.params.data_ptr()
    assert c.stage({"epsilon": 0.2}) == {"epsilon": 0.2}
    assert torch.equal(c.params[0], row(0.05, 0.05))
    assert c.config()["staged"] == {"epsilon": 0.2}
    assert c.apply_staged()
    assert not c.apply_staged()
    assert torch.equal(c.params, row(0.2, 0.05).expand(NUM_LAYERS, -1))
    assert c.params.data_ptr() == address
    assert (c.generation, c.changes) == (1, {"applied": 1, "rejected": 0})
    assert c.config()["in_force"] == {"epsilon": 0.2, "delta": 0.05}
    assert c.config()["settings"]["epsilon"] == 0.2


@pytest.mark.parametrize("bound", ["f8", "student", "clt", "bernstein"])
@pytest.mark.parametrize("delta", [LEAST_DELTA, 0.49])
def test_every_delta_that_is_accepted_has_finite_quantiles(bound, delta):
    c = control.RuntimeControl(Settings(bound=bound), NUM_LAYERS, "cpu")
    c.stage({"delta": delta})
    c.apply_staged()
    assert c.params.isfinite().all()
    table = c.params[0, params.TABLE : params.SPLIT_TABLE]
    assert (table > 0).all()
    assert (table.diff() >= 0).all(), "less is known of the variance, so more is allowed for"


def test_two_patches_before_a_step_are_one_change():
    c = control.RuntimeControl(Settings(), NUM_LAYERS, "cpu")
    c.stage({"epsilon": 0.2})
    c.stage({"delta": 0.1})
    c.apply_staged()
    assert torch.equal(c.params[0], row(0.2, 0.1))
    assert c.generation == 1


def test_learnt_dimensions_reach_their_layers_and_stay_through_a_patch():
    c = control.RuntimeControl(Settings(), NUM_LAYERS, "cpu")
    address = c.params.data_ptr()
    c.set_dimensions((2.25, 8.0, 8.0, 8.0, 1.0))
    assert torch.equal(c.params[0], row(0.05, 0.05, dims=2.25))
    assert torch.equal(c.params[1], row(0.05, 0.05))
    c.stage({"epsilon": 0.2})
    c.apply_staged()
    assert torch.equal(c.params[4], row(0.2, 0.05, "student")), "of one dimension f8 is student's t"
    assert (c.params.data_ptr(), c.generation) == (address, 1)


def test_a_wrong_patch_stages_nothing_and_is_counted():
    c = control.RuntimeControl(Settings(), NUM_LAYERS, "cpu")
    with pytest.raises(PatchError):
        c.stage({"epsilon": 0.1, "delta": 9})
    assert not c.apply_staged()
    assert c.changes == {"applied": 0, "rejected": 1}


def test_a_layer_keeps_its_own_value():
    settings = Settings(layers={"1-2": {"epsilon": 0.01}, "3": {"delta": 0.2}})
    c = control.RuntimeControl(settings, NUM_LAYERS, "cpu")
    c.stage({"epsilon": 0.5})
    c.apply_staged()
    pairs = [(0.5, 0.05), (0.01, 0.05), (0.01, 0.05), (0.5, 0.2), (0.5, 0.05)]
    assert torch.equal(c.params, torch.stack([row(*pair) for pair in pairs]))
    assert c.in_force() == {
        "all": {"epsilon": 0.5, "delta": 0.05},
        "1": {"epsilon": 0.01},
        "2": {"epsilon": 0.01},
        "3": {"delta": 0.2},
    }


def test_an_override_of_a_layer_that_the_model_lacks_is_refused():
    layers = {"4-5": {"epsilon": 0.1}, "3": {"epsilon": 0.1}, "0-9999": {"delta": 0.1}}
    with pytest.raises(ConfigError, match=r"layers\.4-5: got 5; .*0 to 4") as caught:
        control.RuntimeControl(Settings(layers=layers), NUM_LAYERS, "cpu")
    assert [mistake.key for mistake in caught.value.mistakes] == ["layers.4-5", "layers.0-9999"]


def test_one_control_a_process():
    first = control.create(Settings(), NUM_LAYERS, "cpu")
    assert control.create(Settings(epsilon=0.3), NUM_LAYERS, "cpu") is first is control.get()
