"""Inputs of the decode op on a GPU, shared by the tests there."""

from __future__ import annotations

import copy

import pytest
import torch
from decode_case import DecodeCase

from vattn_kernels import ops
from vattn_kernels.triton import layout

# What a step may read at most where a test is about what it draws.
MOST_READ = 0.9
BF16, FP16 = torch.bfloat16, torch.float16


def by_head(side):
    return None if side is None else side.cuda().transpose(0, 1).contiguous().transpose(0, 1)


class GpuCase(DecodeCase):
    """A case whose tensors move to the GPU, with the state that the kernels keep."""

    def __post_init__(self):
        self.settings, self.lanes = {"selector": "sketch", "floor": 0.02} | self.settings, True
        wanted, self.dtype = self.dtype, BF16  # The CPU, which makes the side data, knows no float16.
        super().__post_init__()
        self.dtype = wanted
        for name in ("q", "k_cache", "v_cache"):
            setattr(self, name, getattr(self, name).to(wanted))
        codes, norms, *tables, fields = self.side
        if self.step["selector"] == "quest":
            codes = codes.to(wanted)
        if self.step["selector"] == "sketch":
            fields = fields.cuda()
        self.side = (by_head(codes), by_head(norms), *(None if t is None else t.cuda() for t in tables), fields)
        for name in ("q", "k_cache", "v_cache", "kv_indices", "seq_lens"):
            setattr(self, name, getattr(self, name).cuda())
        self.state = torch.zeros(self.batch, self.num_qo_heads, ops.STATE_WIDTH, device="cuda")
        self.state_rows = torch.arange(self.batch, device="cuda")

    def encode(self):
        """Code every slot again, after keys have changed."""
        slots = torch.arange(self.k_cache.shape[0], device="cuda")
        tables = (t.cuda() for t in self.encode_arguments[3:7])
        scales = {name: self.step[name] for name in ("k_scale", "v_scale") if name in self.step}
        ops.encode(self.k_cache, self.v_cache, slots, *tables, *self.side[:3], **scales)

    def arguments(self):
        # Outputs are poisoned with NaN by the parent; widths of nets stay on the CPU.
        stays = self.side[-1]
        return tuple(a.cuda() if torch.is_tensor(a) and a is not stays else a for a in super().arguments())

    def learnt(self, log_scale):
        """Set what the last step learnt, relative to the log-sum-exp of the fixed set."""
        self.state[..., layout.STATE_SCALE.value] = log_scale
        self.state[..., layout.STATE_CONTEXT.value] = self.context - 1
        self.state[..., layout.STATE_READS.value] = 100.0

    def run(self, **settings):
        arguments = self.arguments()
        ops.decode(*arguments, **(self.step | settings), state=self.state, state_rows=self.state_rows)
        return arguments[-4], arguments[-3], arguments[-2]

    def workspace(self):
        padded_dim, max_len = 1 << (self.head_dim - 1).bit_length(), self.kv_indices.shape[1]
        return layout.workspace(self.q.device, self.batch, max_len, self.num_qo_heads, self.num_kv_heads, padded_dim)

    def lists(self):
        """Which slots every row's last round listed, and their inclusion probabilities, 0 elsewhere."""
        rows, max_len, work = self.batch * self.num_kv_heads, self.kv_indices.shape[1], self.workspace()
        splits, lists = layout.splits_of(rows), layout.LISTS.value
        pi = torch.zeros(rows, self.k_cache.shape[0], device="cuda")
        of_row = layout.capacity(rows, max_len)
        span = of_row // (splits * lists)
        counts = work.counts.view(-1)[: rows * layout.MOST_LISTS].view(rows, -1)[:, : splits * lists].tolist()
        for row, listed in enumerate(counts):
            for i, count in enumerate(listed):
                at = row * of_row + i * span
                entries = work.entries[at : at + count]
                pi[row, entries[:, 0].long()] = entries[:, 1].view(torch.float32)
        return pi > 0, pi


def case(batch, context, heads, kv_heads, head_dim, dtype=BF16, **options):
    return GpuCase(
        batch=batch, context=context, num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
        **options,
    )  # fmt: skip


def with_fp8_cache(dtype, k_scale, v_scale, shape, **options):
    """A case with a scaled fp8 cache, and the same with one of q's dtype that holds what the first stands for."""
    least = ops.GPU_CACHE_CAPABILITY.get(dtype, (0, 0))
    if torch.cuda.get_device_capability() < least:
        pytest.skip(f"{dtype} takes compute capability {least}")
    fp8 = case(*shape, **options)
    plain = copy.copy(fp8)
    for name, scale in (("k_cache", k_scale), ("v_cache", v_scale)):
        stored = (getattr(plain, name).float() / scale).to(dtype)
        setattr(fp8, name, stored)
        setattr(plain, name, (stored.float() * scale).to(plain.dtype))
    fp8.step = fp8.step | {"k_scale": k_scale, "v_scale": v_scale}
    plain.side = (*(t.clone() for t in plain.side[:3]), *plain.side[3:])
    plain.state = plain.state.clone()
    for one in (fp8, plain):
        one.encode()
    return fp8, plain
