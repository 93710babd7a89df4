"""Everything that is refused, each with the reason and what to do."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from vattn_kernels import ops
from vattn_sgl import support
from vattn_sgl.config import Settings

ARGUMENTS = [
    ({"device": "xpu"}, "device xpu"),
    ({"page_size": 16}, "use --page-size 1"),
    ({"kv_cache_dtype": "fp8_e4m3"}, "a CPU reads float32 and bfloat16 caches only; leave it at auto"),
    ({"device": "cuda", "kv_cache_dtype": "fp4_e2m1"}, "fp8_e4m3, fp8_e5m2; leave it at auto"),
    ({"decode_attention_backend": "vattention"}, "use --attention-backend vattention alone"),
    ({"prefill_attention_backend": "torch_native", "decode_attention_backend": "vattention"}, "bypasses the index"),
    ({"speculative_algorithm": "EAGLE"}, "remove --speculative-algorithm"),
    ({"enable_hierarchical_cache": True}, "remove --enable-hierarchical-cache"),
    ({"enable_deterministic_inference": True}, "batch-invariant"),
    ({"enable_dp_attention": True}, "DP attention"),
    ({"enable_two_batch_overlap": True}, "two-batch"),
    ({"enable_unified_memory": True}, "translates slots"),
    ({"enable_lmcache": True}, "LMCache"),
    ({"enable_double_sparsity": True}, "double sparsity"),
    ({"encoder_only": True}, "no decode step"),
    ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
    ({"tokenizer_worker_num": 2}, "use 1"),
    ({"tp_size": 2}, "--tp-size 2"),
    ({"pp_size": 2}, "--pp-size 2"),
    ({"dp_size": 2}, "--dp-size 2"),
    ({"device": "cuda", "tp_size": 2}, "overwrite each other"),
    ({"device": "cuda:0", "pp_size": 2}, "overwrite each other"),
    ({"enable_pdmux": True}, "--enable-pdmux"),
    ({"enable_mixed_chunk": True}, "decode some requests whole, beside a prefill; remove --enable-mixed-chunk"),
]
GPU_SETTINGS = [
    ({"bound": "bernstein"}, "leave bound at null"),
    ({"group_score": "mean"}, "set group_score to max"),
]
MODELS = [
    ({"attention_arch": SimpleNamespace(name="MLA")}, "MLA"),
    ({"is_encoder_decoder": True}, "cross attention"),
    ({"is_generation": False}, "not a generating model"),
    ({"is_hybrid_swa": True}, "sliding-window"),
    ({"hf_text_config": SimpleNamespace(attn_logit_softcapping=50.0)}, "logits capped at 50"),
    ({"head_dim": 64, "v_head_dim": 128}, "differ"),
    ({"head_dim": 72, "v_head_dim": 72}, "multiples of 16"),
    ({"head_dim": 512, "v_head_dim": 512}, "up to 256"),
    ({"num_attention_heads": 7, "num_key_value_heads": 2}, "groups must be whole"),
    ({"num_attention_heads": 64, "num_key_value_heads": 2}, "at most 16"),
]
LAYERS = [
    ({"sliding_window_size": 4096}, "sliding window of 4096"),
    ({"logit_cap": 30.0}, "logits capped at 30"),
    ({"is_cross_attention": True}, "cross attention"),
    ({"attn_type": SimpleNamespace(value="encoder_only")}, "only decoder attention"),
    ({"sinks": torch.zeros(1)}, "learned attention sinks"),
    ({"k_scale": 0.5, "k_scale_float": None}, "--quantization-param-path"),
]


class RadixAttention(torch.nn.Module):
    """Stands for SGLang's layer, which is known by its class's name."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class MHATokenToKVPool:
    """Stands for SGLang's pool."""


class MLATokenToKVPool:
    """Stands for another pool."""


def test_a_plain_server_is_served():
    assert list(support.argument_reasons(SimpleNamespace(device="cpu"))) == []
    assert list(support.model_reasons(SimpleNamespace(head_dim=64, num_attention_heads=9, num_key_value_heads=3))) == []
    assert list(support.pool_reasons(MHATokenToKVPool())) == []
    assert support.layer_reasons(torch.nn.Sequential(RadixAttention(sliding_window_size=-1, logit_cap=0.0))) == []


@pytest.mark.parametrize(("attributes", "expected"), ARGUMENTS)
def test_arguments(attributes, expected):
    reasons = list(support.argument_reasons(SimpleNamespace(**{"device": "cpu"} | attributes)))
    assert len(reasons) == 1
    assert expected in reasons[0]


@pytest.mark.parametrize(("attributes", "expected"), MODELS)
def test_models(attributes, expected):
    reasons = list(support.model_reasons(SimpleNamespace(**attributes)))
    assert len(reasons) == 1
    assert expected in reasons[0]


@pytest.mark.parametrize(("attributes", "expected"), LAYERS)
def test_layers(attributes, expected):
    model = torch.nn.Sequential(RadixAttention(), RadixAttention(**attributes), RadixAttention(**attributes))
    reasons = support.layer_reasons(model)
    assert len(reasons) == 1
    assert expected in reasons[0]


@pytest.mark.parametrize(("fields", "expected"), GPU_SETTINGS)
def test_settings_on_a_gpu(fields, expected):
    (reason,) = support.gpu_reasons(SimpleNamespace(), Settings(**fields))
    assert expected in reason


def test_a_plain_server_is_served_on_a_gpu(monkeypatch):
    graphs = SimpleNamespace(prefill=SimpleNamespace(backend="breakable"))
    args = SimpleNamespace(device="cuda", dp_size=2, page_size=16, cuda_graph_config=graphs)
    assert list(support.argument_reasons(args)) == []
    for selector, sampler in itertools.product(ops.SELECTORS, ops.SAMPLERS):
        weights = "weights.pt" if selector == "hash" else None
        settings = Settings(hash_weights=weights, selector=selector, sampler=sampler)
        assert list(support.gpu_reasons(args, settings)) == []
    for name in ("fp8_e4m3", "fp8_e5m2"):
        args.kv_cache_dtype = name
        assert list(support.argument_reasons(args)) == []
    graphs.prefill.backend = "full"
    assert "use breakable" in next(support.gpu_reasons(args, Settings()))
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    assert len(list(support.gpu_reasons(args, Settings()))) == 2


def test_head_dims_on_a_gpu():
    assert list(support.gpu_model_reasons(SimpleNamespace(head_dim=128))) == []
    assert "serve 64, 96, 128, 256" in next(support.gpu_model_reasons(SimpleNamespace(head_dim=80)))


def test_a_model_of_four_bytes_is_refused_on_a_gpu_whatever_its_cache():
    assert list(support.gpu_model_reasons(SimpleNamespace(dtype=torch.float16))) == []
    assert "--dtype bfloat16" in next(support.gpu_model_reasons(SimpleNamespace(dtype=torch.float32)))


def test_dtypes_on_a_gpu():
    pool = MHATokenToKVPool()
    for dtype in ops.GPU_CACHE_DTYPES:
        pool.dtype = dtype
        assert list(support.gpu_pool_reasons(pool, capability=(9, 0))) == []
    for dtype in (torch.float32, torch.float8_e4m3fnuz):
        pool.dtype = dtype
        (reason,) = support.gpu_pool_reasons(pool)
        assert "use --dtype bfloat16" in reason
    for dtype in set(ops.GPU_CACHE_DTYPES) - set(ops.GPU_DTYPES):
        pool.dtype = dtype
        (reason,) = support.gpu_pool_reasons(pool, "quest", (9, 0))
        assert "selector quest reads 16 bits; use --kv-cache-dtype auto or selector sketch" in reason
    pool.dtype = torch.float8_e4m3fn
    assert list(support.gpu_pool_reasons(pool, capability=(8, 9))) == []
    (reason,) = support.gpu_pool_reasons(pool, capability=(8, 6))
    assert "takes compute capability 8.9, not 8.6; use --kv-cache-dtype fp8_e5m2" in reason


def test_gpus_older_than_the_kernels_are_named():
    assert list(support.gpu_device_reasons((8, 0))) == list(support.gpu_device_reasons((9, 0))) == []
    (reason,) = support.gpu_device_reasons((7, 5))
    assert "7.5" in reason and "8.0" in reason


def test_a_cache_is_of_its_models_dtype_or_fp8():
    pool, config = MHATokenToKVPool(), SimpleNamespace(dtype=torch.float16)
    pool.dtype = torch.bfloat16
    (reason,) = support.dtype_reasons(config, pool)
    assert "float16 with a KV cache of torch.bfloat16" in reason and "--kv-cache-dtype auto" in reason
    for dtype in (torch.float16, *ops.GPU_CACHE_CAPABILITY):
        pool.dtype = dtype
        assert list(support.dtype_reasons(config, pool)) == []
    server = SimpleNamespace(device="cpu")
    runner = SimpleNamespace(server_args=server, model_config=SimpleNamespace(dtype=torch.float32))
    runner.token_to_kv_pool = pool
    pool.dtype = torch.bfloat16
    with pytest.raises(support.Unsupported, match="use --kv-cache-dtype auto"):
        support.check(runner, Settings())


def test_dtypes_on_a_cpu():
    pool = MHATokenToKVPool()
    runner = SimpleNamespace(
        server_args=SimpleNamespace(device="cpu"), model_config=SimpleNamespace(), token_to_kv_pool=pool
    )
    for dtype in (torch.bfloat16, torch.float32):
        pool.dtype = dtype
        support.check(runner, Settings())
    pool.dtype = torch.float16
    with pytest.raises(support.Unsupported, match=r"KV cache of torch\.float16.*--dtype bfloat16 or float32"):
        support.check(runner, Settings())


def test_pools(monkeypatch):
    assert "MLATokenToKVPool" in next(support.pool_reasons(MLATokenToKVPool()))
    pool = MHATokenToKVPool()
    pool.kv_cache_layout = "hnd"
    assert "layout" in next(support.pool_reasons(pool))
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    assert "HND" in next(support.argument_reasons(SimpleNamespace(device="cpu")))


def test_all_reasons_are_told_at_once():
    runner = SimpleNamespace(
        server_args=SimpleNamespace(device="cpu", page_size=64, tp_size=2),
        model_config=SimpleNamespace(is_encoder_decoder=True),
        token_to_kv_pool=MLATokenToKVPool(),
        model=RadixAttention(logit_cap=30.0),
    )
    with pytest.raises(support.Unsupported) as caught:
        support.check(runner, Settings())
    assert len(caught.value.reasons) == 5
    assert all(f"- {reason}" in str(caught.value) for reason in caught.value.reasons)
