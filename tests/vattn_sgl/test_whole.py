"""Which decode batches a dense backend takes, and that their steps do as ours else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from vattn_sgl import prefill
from vattn_sgl.config import Settings
from vattn_sgl.whole import WholeDecode

BELOW = 100


class Dense:
    """Stands for a dense backend of SGLang; keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        self.calls.append(("out_graph", in_capture))

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        self.calls.append(("decode", tuple(q.shape), save_kv_cache))
        return q + 1

    def get_cuda_graph_seq_len_fill_value(self):
        return 1


class Ours:
    """Stands for our backend."""

    def __init__(self, covered):
        self.selector = SimpleNamespace(covered_positions=lambda: covered)
        self.settings = Settings(dense_below=BELOW)
        self.capturing = False
        self.counted, self.begun, self.written = [], [], []
        self.telemetry = SimpleNamespace(count_whole=self.counted.append)

    def begin(self, forward_batch, in_capture=False):
        self.begun.append(in_capture)

    def write(self, q, k, v, layer, forward_batch, save_kv_cache):
        self.written.append(save_kv_cache)
        return q.view(-1, 2, 4)


def batch(*lengths):
    lengths = torch.tensor(lengths)
    return SimpleNamespace(forward_mode=ForwardMode.DECODE, seq_lens_cpu=lengths, seq_lens=lengths)


@pytest.fixture
def whole(monkeypatch):
    """Makes one over contexts that are covered up to a length."""

    def make(covered=1000):
        dense = Dense()
        asked = []
        monkeypatch.setattr(
            "vattn_sgl.whole.delegate", lambda runner, setting, name: asked.append((setting, name)) or dense
        )
        made = WholeDecode(SimpleNamespace(), Settings(dense_backend="triton"), Ours(covered))
        assert asked == [("dense_backend", "triton")]
        return made

    return make


@pytest.mark.parametrize(
    ("covered", "lengths", "taken"),
    [
        (1000, (5, 99), True),
        (1000, (5, 100), False),
        (1000, (1001, 5), True),
        (0, (5, 500), True),
        (1000, (1000,), False),
        (1000, (), False),
    ],
)
def test_only_batches_that_are_read_whole_are_taken(whole, covered, lengths, taken):
    assert whole(covered).reads(batch(*lengths)) is taken


def test_a_batch_of_unknown_lengths_is_not_taken(whole):
    unknown = SimpleNamespace(forward_mode=ForwardMode.DECODE, seq_lens_cpu=None, seq_lens=torch.tensor([5]))
    assert not whole().reads(unknown)


def test_a_replay_begins_a_step_and_counts_it(whole):
    made = whole()
    made.init_forward_metadata_out_graph(batch(5, 99, 1))
    assert made.ours.begun == [False]
    assert [n.tolist() for n in made.ours.counted] == [[5, 99, 1]]
    assert made.dense.calls == [("out_graph", False)]


def test_a_capture_counts_nothing(whole):
    made = whole()
    made.init_forward_metadata_out_graph(batch(1, 1), in_capture=True)
    made.ours.capturing = True
    made.init_forward_metadata_out_graph(batch(1, 1))
    assert made.ours.counted == []
    assert made.ours.begun == [True, False]


def test_new_tokens_are_written_once_and_by_us(whole):
    made = whole()
    q = torch.zeros(3, 8)
    out = made.forward_decode(q, q, q, None, batch(5, 5, 5))
    assert torch.equal(out, q + 1)
    assert made.ours.written == [True]
    assert made.dense.calls == [("decode", (3, 8), False)]


def test_a_backend_that_sglang_lacks_is_refused():
    with pytest.raises(prefill.BackendError, match="dense_backend 'flashinfre' is not a backend of SGLang; known are"):
        prefill.check_name("dense_backend", "flashinfre")
