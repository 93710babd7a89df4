"""Side data on a GPU: layout, and indexing inside a CUDA graph that is older than the calibration."""

from __future__ import annotations

import pytest
import torch
from hash_nets import hash_weights

from vattn_kernels import pages
from vattn_kernels.sketch import UNUSABLE
from vattn_sgl.config import Settings
from vattn_sgl.selectors import REGISTRY, CacheGeometry

pytestmark = pytest.mark.gpu

LAYERS, SLOTS, KV_HEADS, QO_HEADS, HEAD_DIM = 2, 2048, 2, 4, 64
PROMPT, BATCH = 600, 4


class Pool:
    """Stands for SGLang's: random K and V, stored already."""

    def __init__(self):
        shape = (LAYERS, SLOTS, KV_HEADS, HEAD_DIM)
        self.k, self.v = (torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(2))

    def get_key_buffer(self, layer):
        return self.k[layer]

    def get_kv_buffer(self, layer):
        return self.k[layer], self.v[layer]


@pytest.fixture
def pool():
    torch.manual_seed(0)
    return Pool()


@pytest.fixture(params=["sketch", "quest", "sign", "hash"])
def selector(request, tmp_path, monkeypatch):
    monkeypatch.setenv("VATTN_CACHE", str(tmp_path))
    weights = hash_weights(tmp_path / "weights.pt", LAYERS, QO_HEADS, HEAD_DIM) if request.param == "hash" else None
    settings = Settings(calibration_tokens=512, hash_weights=weights, selector=request.param)
    device = torch.device("cuda")
    geometry = CacheGeometry(LAYERS, SLOTS, KV_HEADS, HEAD_DIM, device, torch.bfloat16, num_qo_heads=QO_HEADS)
    return REGISTRY[request.param](settings, geometry, range(LAYERS), "model")


def queries(count):
    return torch.randn(count, QO_HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)


def write(selector, pool, q, slots, positions):
    for layer in range(LAYERS):
        selector.after_write(layer, q, slots, positions, pool)


def test_rows_of_a_head_stand_side_by_side(selector):
    for name in ("codes", "norms"):
        side = selector.side[name]
        slots = pages.PAGE if (selector.name, name) == ("quest", "codes") else 1
        assert side.shape[:3] == (LAYERS, SLOTS // slots, KV_HEADS)
        assert side.transpose(1, 2).is_contiguous()
    assert selector.valid.is_contiguous()


def test_a_graph_older_than_the_calibration_indexes_by_it(selector, pool):
    slots, positions = (torch.zeros(BATCH, dtype=torch.int64, device="cuda") for _ in range(2))
    q = queries(BATCH)
    write(selector, pool, q, slots, positions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(selector, pool, q, slots, positions)
    assert selector.covered_positions() == 0

    prompt = torch.arange(1, PROMPT + 1, device="cuda")
    selector.begin_forward(PROMPT, PROMPT, pool)
    write(selector, pool, queries(PROMPT), prompt, prompt - 1)
    selector.begin_forward(PROMPT + 1, 0, pool)
    assert selector.covered_positions() >= PROMPT
    assert int(selector.covered) == selector.covered_positions()
    assert selector.valid[:, prompt].all() and not selector.valid[:, PROMPT + 1 :].any()

    new = torch.arange(1000, 1000 + BATCH, device="cuda")
    slots.copy_(new)
    positions.fill_(PROMPT)
    graph.replay()
    assert selector.valid[:, new].all() and (selector.positions[new] == PROMPT).all()
    rows = {name: new // pages.PAGE if selector.name == "quest" and name == "codes" else new for name in selector.side}
    replayed = {name: side[:, rows[name]].clone() for name, side in selector.side.items()}
    assert replayed["codes"].unique().numel() > BATCH
    for name, side in selector.side.items():
        side[:, rows[name]] = 0
    for layer in range(LAYERS):
        selector.encode(layer, *pool.get_kv_buffer(layer), new)
    for name, side in selector.side.items():
        assert torch.equal(side[:, rows[name]], replayed[name])


def test_what_somebody_else_wrote_is_read_for_certain(selector, pool):
    selector.invalidate(torch.tensor([7, 9], device="cuda"))
    if selector.name == "sketch":
        assert (selector.norms[:, [7, 9], :, 0] == UNUSABLE).all()
    assert not selector.valid[:, [7, 9]].any()
