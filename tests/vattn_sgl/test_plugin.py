"""The plugin's own check, and its hooks on SGLang's scheduler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.io_struct import GetInternalStateReq, SetInternalStateReq

from vattn_sgl import admin, control, plugin
from vattn_sgl.config import Settings


@pytest.fixture
def loaded(monkeypatch):
    """The plugin, loaded by SGLang."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    monkeypatch.setattr(plugin, "_registered", [plugin.SET_STATE])


def test_a_whole_plugin_passes(loaded, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", {plugin.SET_STATE})
    plugin.self_check()


def test_a_hook_that_was_not_applied_stops_the_server(loaded, monkeypatch):
    monkeypatch.setattr(plugin, "_registered", ["sglang.srt.no.such.target"])
    with pytest.raises(plugin.PluginError, match=r"sglang\.srt\.no\.such\.target"):
        plugin.self_check()


def test_a_plugin_that_was_never_loaded_stops_the_server(monkeypatch):
    monkeypatch.setattr(plugin, "_registered", [])
    with pytest.raises(plugin.PluginError, match="not called"):
        plugin.self_check()


def test_a_failed_load_is_kept_and_stops_the_server(monkeypatch):
    def broken():
        raise ImportError("no such module")

    monkeypatch.setattr(plugin, "_load", broken)
    monkeypatch.setattr(plugin, "_failure", None)
    with pytest.raises(ImportError):
        plugin.load()
    with pytest.raises(plugin.PluginError, match="no such module"):
        plugin.self_check()


@pytest.mark.parametrize("name", ["attention_backend", "decode_attention_backend", "prefill_attention_backend"])
def test_another_backend_is_left_alone(name, monkeypatch):
    monkeypatch.setattr(plugin, "_failure", ImportError("broken"))
    plugin._before_http_server(SimpleNamespace(**{name: "torch_native"}))
    with pytest.raises(plugin.PluginError):
        plugin._before_http_server(SimpleNamespace(**{name: "vattention"}))


def pool_tokens(budget, **arguments):
    """Tokens of the pool that SGLang's own configurator makes of a memory budget, and the bytes of one."""
    from sglang.srt.model_executor import pool_configurator
    from sglang.srt.runtime_context import get_parallel

    server_args = SimpleNamespace(**({"attention_backend": "vattention", "enable_hisparse": False} | arguments))
    model = SimpleNamespace(
        head_dim=64,
        v_head_dim=64,
        num_attention_heads=9,
        get_num_kv_heads=lambda *ranks: 3,
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
    )
    configurator = SimpleNamespace(
        model_config=model,
        server_args=server_args,
        kv_cache_dtype=torch.float32,
        use_mla_backend=False,
        is_draft_worker=False,
    )
    made = pool_configurator.DefaultPoolConfigurator.__new__(pool_configurator.DefaultPoolConfigurator)
    made.kv_cache_dtype_str = "auto"
    with get_parallel().override(attn_tp_size=1, attn_dcp_size=1):
        made._cell_size = made._compute_cell_size(configurator, 30)
    return made.calculate_pool_sizes(budget, 1).max_total_num_tokens, made._cell_size


@pytest.mark.parametrize(("selector", "side"), [("sketch", 934), ("quest", 3004), ("oracle", 0)])
def test_side_data_count_in_the_memory_budget(loaded, monkeypatch, selector, side):
    monkeypatch.setenv("VATTN_SELECTOR", selector)
    monkeypatch.setattr("sglang.srt.layers.cp.utils.get_glm_dsa_layer_split_effective_num_layers", lambda kvc, n: n)
    dense, cell = pool_tokens(2**30, attention_backend="torch_native")
    assert cell == 30 * 3 * 128 * 4
    tokens, with_side = pool_tokens(2**30)
    assert with_side == cell + side
    assert tokens == 2**30 // (cell + side)
    assert tokens <= dense


def scheduler(admin_key="key"):
    return SimpleNamespace(server_args=SimpleNamespace(admin_api_key=admin_key))


def set_state(values, admin_key="key"):
    request = SetInternalStateReq(server_args=values)
    return plugin._set_internal_state(lambda scheduler, req: "sglang's", scheduler(admin_key), request)


def get_state(admin_key="key", rid=admin.STATE_REQUEST):
    result = SimpleNamespace(internal_state={"a": 1})
    request = GetInternalStateReq(rid=rid)
    return plugin._get_internal_state(result, scheduler(admin_key), request).internal_state


def test_our_values_are_staged_and_others_left_to_sglang():
    current = control.create(Settings(), 2, "cpu")
    assert set_state({"other": 1}) == "sglang's"
    assert set_state({"vattention_epsilon": 0.2}).updated
    assert current.config()["staged"] == {"epsilon": 0.2}


def test_what_a_scheduler_refuses_changes_nothing():
    assert not set_state({"vattention_epsilon": 0.2}).updated
    current = control.create(Settings(), 2, "cpu")
    assert not set_state({"vattention_epsilon": 7}).updated
    assert not set_state({"vattention_epsilon": 0.2, "other": 1}).updated
    assert current.config()["staged"] == {}
    assert current.changes["rejected"] == 1


@pytest.mark.parametrize("admin_key", [None, ""])
def test_sglangs_unguarded_routes_reach_nothing_of_ours_without_an_admin_key(admin_key):
    current = control.create(Settings(), 2, "cpu")
    assert not set_state({"vattention_epsilon": 0.2}, admin_key).updated
    assert not set_state({"vattention_rejected": 1}, admin_key).updated
    assert set_state({"other": 1}, admin_key) == "sglang's"
    assert (current.config()["staged"], current.changes) == ({}, {"applied": 0, "rejected": 0})
    assert get_state(admin_key) == {"a": 1}


def test_a_request_rejected_by_the_http_server_is_counted():
    current = control.create(Settings(), 2, "cpu")
    assert set_state({"vattention_rejected": 1}).updated
    assert current.changes == {"applied": 0, "rejected": 1}
    assert current.config()["staged"] == {}


@pytest.mark.parametrize(
    "values", [{"rejected": -1}, {"rejected": 2}, {"rejected": float("nan")}, {"rejected": 1, "epsilon": 0.2}]
)
def test_the_counter_of_rejections_takes_only_a_step(values):
    current = control.create(Settings(), 2, "cpu")
    assert not set_state({f"vattention_{name}": value for name, value in values.items()}).updated
    assert (current.config()["staged"], current.changes) == ({}, {"applied": 0, "rejected": 0})


def test_the_state_is_added_to_sglangs_own_where_our_routes_ask():
    assert get_state() == {"a": 1}
    control.create(Settings(), 2, "cpu")
    state = get_state()
    assert state["a"] == 1
    assert state["vattention"]["config"]["in_force"] == {"epsilon": 0.05, "delta": 0.05}
    assert get_state(rid=None) == {"a": 1}
