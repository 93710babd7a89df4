"""GPU implementation of the ops in Triton and Gluon: kernels of fixed grids, no wait for the host, no allocation.

A step is five launches: ``prepare``, ``select``, ``attend``, ``combine``, ``finish``. The first draw takes a scale
predicted from the request's last step, and some of its tokens tell what each head asks for; in ``finish`` a group that
it did not certify draws again at the scale its variance asks for, and one that is still open reads everything. Mostly
none is, and it ends at once. For ``sign`` and ``hash`` one more launch, ahead of all, signs the queries. Audits, where
they are on, add three: ``choose``, ``finish``, ``audit``. From sm_90 on a launch starts while the one ahead ends, and a
split is attended to, and a row merged, as soon as what it needs of the launch ahead is there (`layout.await_signals`).

Sampler ``uniform`` takes other launches between the first and the last: ``rank`` and ``top_k``, then ``list``,
``attend`` and ``budget`` for the pilot, and the same for the budget. They wait for each other, and for speed it has no
claim. Its ranks divide a head's scores by the mass that sink and window promise, by their share of it in the last step,
where the reference takes this step's estimate, so a request's first step is read whole; and what its lists do not hold,
top-k and sample each in splits of their own, is read whole whatever the cap.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vattn_kernels import params as parameters
from vattn_kernels.checks import (
    FP8_DTYPES,
    SAMPLERS,
    check_cache,
    check_contiguous,
    check_decode,
    check_settings,
    check_signatures,
    check_slots,
    check_tensor,
    require,
)
from vattn_kernels.ops import GPU_CACHE_DTYPES, GPU_DTYPES, GPU_HEAD_DIMS, SELECTORS, STATE_WIDTH
from vattn_kernels.quantiles import TARGETS
from vattn_kernels.sketch import GROUPS_PER_WORD, LANES
from vattn_kernels.triton import carveout, layout
from vattn_kernels.triton.attend import attend_fwd_kernel
from vattn_kernels.triton.attend_gluon import attend_lists_fwd_kernel
from vattn_kernels.triton.audit import audit_fwd_kernel, choose_fwd_kernel
from vattn_kernels.triton.combine import combine_fwd_kernel
from vattn_kernels.triton.finish import finish_fwd_kernel
from vattn_kernels.triton.pages import bound_pages_fwd_kernel, mark_slots_fwd_kernel
from vattn_kernels.triton.prepare import prepare_fwd_kernel
from vattn_kernels.triton.select import select_fwd_kernel
from vattn_kernels.triton.select_gluon import select_lists_fwd_kernel
from vattn_kernels.triton.side import check_encoded, side_of, sizes_of
from vattn_kernels.triton.signature import ROWS, sign_keys_fwd_kernel, sign_queries_fwd_kernel
from vattn_kernels.triton.top_k import rank_fwd_kernel, top_k_fwd_kernel
from vattn_kernels.triton.uniform import budget_fwd_kernel, list_fwd_kernel
from vattn_kernels.triton.update import update_fwd_kernel

# Steps after which what was learnt of a request row is no longer trusted.
MOST_AGE = 64
# Sets of pools whose addresses are kept: every layer's own, and all layers' together.
MOST_POOLS = 1024


carveout.share(
    (
        prepare_fwd_kernel, select_lists_fwd_kernel, select_fwd_kernel, attend_lists_fwd_kernel, attend_fwd_kernel,
        combine_fwd_kernel, finish_fwd_kernel,
    )
)  # fmt: skip


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    check_cache(k_cache, v_cache, GPU_CACHE_DTYPES if k_cache.is_cuda else (*GPU_CACHE_DTYPES, torch.float32))
    require(k_cache.shape[-1] in GPU_HEAD_DIMS, "head_dim {}, expected one of {}", k_cache.shape[-1], GPU_HEAD_DIMS)
    if k_cache.is_cuda:
        current = torch.cuda.current_device()
        require(
            k_cache.device.index == current,
            "the KV cache lies on {}, kernels are launched on cuda:{}; call it within torch.cuda.device",
            *(k_cache.device, current),
        )


def _check_scaled(selector: str, k_cache: Tensor, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    require(
        selector == "sketch" or (k_cache.dtype not in FP8_DTYPES and k_scale == v_scale == 1),
        "selector {!r} reads no cache of {} or with scales; expected 'sketch', or 16 bits",
        *(selector, k_cache.dtype),
    )


def reserve(
    device: torch.device,
    max_batch: int,
    max_len: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sampler: str = "proportional",
) -> None:
    """Allocate the workspace of the largest batch, so that no later step does.

    A device has one, so that steps, captured ones too, must follow each other on one stream.

    Parameters
    ----------
    device : torch.device
        Where the cache lives.
    max_batch, max_len : int
        Requests at once, and width of the page table.
    num_qo_heads, num_kv_heads, head_dim : int
        Of the model on this rank.
    sampler : {"proportional", "uniform"}
        Of the settings; ``uniform`` takes more.
    """
    if device.type == "cuda" and device.index is None:
        # A step's tensors tell the number of theirs.
        device = torch.device("cuda", torch.cuda.current_device())
    work = layout.workspace(device, max_batch, max_len, num_qo_heads, num_kv_heads, _power_of_two(head_dim))
    if sampler == "uniform":
        layout.ranking(device, work)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_indices: Tensor, seq_lens: Tensor, codes: Tensor | None,
    norms: Tensor | None, valid: Tensor | None, mean: Tensor | None, query_basis: Tensor | None, steps: Tensor | None,
    fields: Tensor | None, params: Tensor, covered: Tensor, budget_edges: Tensor, error_edges: Tensor,
    audit_edges: Tensor, out: Tensor, stats: Tensor, counters: Tensor, counter_offsets: list[int], sm_scale: float,
    layer_id: int, seed: int, sampler: str, target: str, selector: str, sink: int, window: int, dense_below: int,
    top_k_count: int, top_k_share: float, pilot: float, pilot_min: int, cap: float, floor: float, audit_rate: float,
    group_score: str = "max", state: Tensor | None = None, state_rows: Tensor | None = None, k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:  # fmt: skip
    """GPU implementation of `vattn_kernels.ops.decode`."""
    _check_cache(k_cache, v_cache)
    require(q.dtype in GPU_DTYPES or not q.is_cuda, "q is {}, expected one of {}", q.dtype, GPU_DTYPES)
    check_decode(
        q, k_cache, kv_indices, seq_lens, params, covered, budget_edges, error_edges, audit_edges, out, stats, counters,
        counter_offsets, target,
    )  # fmt: skip
    batch, num_qo_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_qo_heads // num_kv_heads
    require(sampler in SAMPLERS, "sampler {!r} is unknown, expected one of {}", sampler, SAMPLERS)
    require(group_score == "max", "group_score {!r} runs on the CPU only; expected 'max'", group_score)
    check_settings(sm_scale, sink, window, pilot, pilot_min, cap, floor, audit_rate, k_scale, v_scale)
    _check_scaled(selector, k_cache, k_scale, v_scale)
    side = side_of(selector, q, k_cache, codes, norms, valid, mean, query_basis, steps, fields)
    if state is None or state_rows is None:
        raise ValueError("vattn: a GPU needs state and state_rows, got None; see vattn_kernels.ops.decode")
    check_tensor("state", state, torch.float32, (None, num_qo_heads, STATE_WIDTH))
    check_tensor("state_rows", state_rows, torch.int64, (batch,))

    rows, max_len = batch * num_kv_heads, kv_indices.shape[1]
    work = layout.workspace(q.device, batch, max_len, num_qo_heads, num_kv_heads, _power_of_two(head_dim))
    splits, tail = layout.splits_of(rows), layout.tail_splits_of(rows, max_len)
    capacity = layout.capacity(rows, max_len)
    words, groups, width = side.words, side.groups, layout.width_of(group)
    coded = _power_of_two(max(16, 4 * groups))
    padded_group, padded_dim = _power_of_two(group), _power_of_two(head_dim)
    kv_stride, k_stride = kv_indices.stride(0), k_cache.stride(0)
    launch = layout.LAUNCH
    is_uniform = sampler == "uniform"
    overlap = layout.launches_overlap(q.device) and not is_uniform
    follow = {"DEPENDENT": overlap, "launch_pdl": overlap}
    signals = follow | {"SIGNALS": layout.MOST_SPLITS}
    is_split = target == "sdpa"
    model = {"HKV": num_kv_heads, "G": group, "D": head_dim, "DP": padded_dim}
    counters_p = _power_of_two(counters.numel())
    is_sketch = selector == "sketch"
    choice = {"SELECTOR": SELECTORS.index(selector)}
    if side.nets is not None:
        first, second, bits = side.sizes
        sign_queries_fwd_kernel[(-(-batch // ROWS.value), num_qo_heads)](
            q, side.nets, work.query, batch, side.nets.shape[1],
            HQ=num_qo_heads, D=head_dim, FIRST=first, SECOND=second, LAST=bits, num_warps=4,
        )  # fmt: skip
    prepare_fwd_kernel[(2 * rows,)](
        q, k_cache, kv_indices, seq_lens, mean, query_basis, steps, side.fields, covered, state, state_rows,
        work.mode, work.codes, work.query, work.bias, work.log_scale, work.fixed, work.scale, work.listed,
        work.attended, sm_scale, k_scale, floor, sink, window, dense_below, pilot_min, kv_stride, k_stride,
        **model, **choice, GP=max(16, padded_group), R=side.width, C=coded, CODES=4 * groups, F=launch.prepare_block,
        WIDTH=STATE_WIDTH, MOST_AGE=MOST_AGE, UNIFORM=is_uniform, **signals, num_warps=launch.prepare_warps,
    )  # fmt: skip

    target_id = TARGETS.index(target)
    lists = (work.mode, work.entries, work.counts, work.outs, work.scalars)
    sketch = {"R": side.width, "GROUPS": groups, "WORDS": words, "MOST": layout.MOST_LISTS}
    merge = model | {
        "GP": padded_group, "WIDTH": width, "STATE": STATE_WIDTH, "TARGET": target_id,
        "TABLE": parameters.SPLIT_TABLE if is_split else parameters.TABLE, "POINTS": parameters.TABLE_POINTS,
        "PER_UNIT": parameters.TABLE_STEPS_PER_UNIT, "BUDGET_EDGES": budget_edges.numel(),
        "BUDGET_EDGES_P": _power_of_two(budget_edges.numel() + 1), "ERROR_EDGES": error_edges.numel(),
        "ERROR_EDGES_P": _power_of_two(error_edges.numel() + 1), "COUNTERS_P": counters_p,
    }  # fmt: skip
    warps = layout.LISTS.value
    attend = {"BN": launch.attend_block, "WIDE": q.dtype != torch.bfloat16, "num_warps": warps}
    # The kernels take the bits of an unsigned seed for those of a signed argument, whose type never changes then.
    key = ((seed + (1 << 31)) % (1 << 32) - (1 << 31), layer_id)
    logit_scale = sm_scale * k_scale
    settled = (
        work.heads, work.log_scale, work.fixed, work.reads, work.asked, work.arrivals, params, state, state_rows,
        budget_edges, error_edges, out, stats, counters,
    )  # fmt: skip

    query = work.codes if is_sketch else work.query
    ranking = layout.ranking(q.device, work) if is_uniform else None
    plan = None if ranking is None else ranking.plan

    def finish(is_audit: bool) -> None:
        programs = layout.programs_at_once(q.device, layout.finish_programs(q.device, padded_dim))
        finish_fwd_kernel[(min(programs, rows * (tail + 1)),)](
            q, k_cache, v_cache, kv_indices, seq_lens, *lists, side.rows, side.norms, side.fields, query, work.bias,
            work.scale, work.used, work.barrier, *settled, logit_scale, v_scale, sink, window, *key, rows,
            launch.tail_items, kv_stride, k_stride, side.head_stride, side.norm_stride, capacity, cap,
            *counter_offsets[:5], side.valid, side.row_stride, plan, **merge, **sketch, **attend, **choice,
            **follow, SPLITS=tail, LEAST=layout.LEAST_SPLITS, ROWS_P=layout.padded_rows(rows),
            EXACT_BN=layout.exact_block(padded_dim), STAGES=launch.exact_stages, CAPPED=cap < 1, UNIFORM=is_uniform,
            AUDIT=is_audit, DP4A=q.is_cuda, launch_cooperative_grid=True,
        )  # fmt: skip

    is_aligned = k_cache.data_ptr() % 16 == 0 and v_cache.data_ptr() % 16 == 0
    is_narrow = is_aligned and layout.one_warp_attends(k_cache.dtype, head_dim, group)

    def attend_splits() -> None:
        given = (
            q, k_cache, v_cache, kv_indices, seq_lens, *lists, work.listed, work.attended, side.rows, side.norms,
            side.fields, query, work.bias, work.log_scale, work.scale, work.asked, side.valid, logit_scale, sink,
            window,
        )  # fmt: skip
        surveyed = side.row_stride, side.head_stride, side.norm_stride, capacity
        constants = {"SPLITS": splits, "TARGET": target_id, "UNIFORM": is_uniform, "DP4A": q.is_cuda}
        constants |= {"SURVEYED": layout.surveyed(group)} | sketch | choice | signals
        if layout.gluon_serves(q.device) and is_narrow:
            attend_lists_fwd_kernel[(rows * (splits + 1),)](
                *given, kv_stride, *surveyed, HKV=num_kv_heads, G=group, WIDTH=width, D=head_dim, **constants,
                num_warps=1,
            )  # fmt: skip
        else:
            attend_fwd_kernel[(rows * (splits + 1),)](
                *given, kv_stride, k_stride, *surveyed, **model, WIDTH=width, **attend, **constants,
                maxnreg=layout.attend_registers(width, padded_dim),
            )  # fmt: skip

    def draw_uniformly(ranking: layout.Ranking) -> None:
        rank_fwd_kernel[(rows * splits,)](
            side.rows, side.norms, kv_indices, seq_lens, side.fields, work.mode, query, work.bias, work.log_scale,
            work.scale, ranking.ranks, side.valid, v_cache, sink, window, sm_scale, kv_stride, side.head_stride,
            side.norm_stride, side.row_stride, capacity, HKV=num_kv_heads, G=group, D=head_dim, R=side.width,
            GROUPS=groups, WORDS=words, SPLITS=splits, DP4A=q.is_cuda, **choice, num_warps=warps,
        )  # fmt: skip
        top_k_fwd_kernel[(rows,)](
            seq_lens, work.mode, ranking.ranks, ranking.plan, sink, window, top_k_count, top_k_share, pilot, pilot_min,
            capacity, HKV=num_kv_heads, SPLITS=splits, num_warps=launch.uniform_warps,
        )  # fmt: skip
        for is_pilot in (True, False):
            list_fwd_kernel[(2 * rows,)](
                kv_indices, seq_lens, work.mode, ranking.ranks, ranking.plan, work.entries, work.counts, sink,
                window, *key, kv_stride, capacity, HKV=num_kv_heads, SPLITS=splits, MOST=layout.MOST_LISTS,
                num_warps=launch.uniform_warps,
            )  # fmt: skip
            attend_splits()
            budget_fwd_kernel[(rows,)](
                work.outs, work.scalars, seq_lens, work.mode, ranking.plan, work.fixed, *settled[6:], v_scale, sink,
                window, cap, capacity, *counter_offsets[:5], **merge, SPLITS=splits, IS_PILOT=is_pilot,
                num_warps=layout.combine_warps(splits),
            )  # fmt: skip

    def draw_by_score() -> None:
        score = (
            side.rows, side.norms, kv_indices, seq_lens, side.fields, work.mode, query, work.bias, work.log_scale,
            work.scale, work.entries, work.counts, work.reads, work.listed, sink, window, *key, kv_stride,
            side.head_stride, side.norm_stride, capacity,
        )  # fmt: skip
        if layout.gluon_serves(q.device) and is_sketch and layout.tensor_cores_score(group, words):
            select_lists_fwd_kernel[(rows * splits,)](
                *score, HKV=num_kv_heads, G=group, SPLITS=splits, TARGET=target_id, **sketch, **signals,
                num_warps=warps, maxnreg=layout.select_registers(group, words),
            )  # fmt: skip
        else:
            select_fwd_kernel[(rows * splits,)](
                *score, side.valid, v_cache, sm_scale, side.row_stride, HKV=num_kv_heads, G=group, D=head_dim,
                SPLITS=splits, TARGET=target_id, **sketch, **choice, **signals, DP4A=q.is_cuda, num_warps=warps,
            )  # fmt: skip
        attend_splits()
        combine_fwd_kernel[(rows * group,)](
            work.outs, work.scalars, work.heads, seq_lens, work.mode, work.counts, work.attended, *settled[1:],
            v_scale, sink, window, cap, *counter_offsets[:5], **merge, **follow, MOST=layout.MOST_LISTS,
            SPLITS=splits, num_warps=layout.combine_warps(splits),
        )  # fmt: skip

    if ranking is not None:
        draw_uniformly(ranking)
    else:
        draw_by_score()
    finish(is_audit=False)
    if audit_rate > 0:
        choose_fwd_kernel[(rows,)](
            seq_lens, stats, work.mode, *key, audit_rate, HKV=num_kv_heads, G=group, **follow, num_warps=1,
        )  # fmt: skip
        finish(is_audit=True)
        audit_fwd_kernel[(rows,)](
            work.outs, work.scalars, work.mode, work.used, params, audit_edges, out, counters, v_scale,
            *counter_offsets[5:], G=group, GP=padded_group, WIDTH=width, D=head_dim, DP=padded_dim, SPLITS=tail,
            AUDIT_EDGES=audit_edges.numel(),
            AUDIT_EDGES_P=_power_of_two(audit_edges.numel() + 1), COUNTERS_P=counters_p, **follow, num_warps=4,
        )  # fmt: skip


def encode(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, mean: Tensor, key_basis: Tensor, steps: Tensor, fields: Tensor,
    codes: Tensor, norms: Tensor, valid: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """GPU implementation of `vattn_kernels.ops.encode`."""
    tables, side = (mean, key_basis, steps, fields), (codes, norms, valid)
    stacked = (t[None] for t in (*tables, *side))
    encode_layers([k_cache], [v_cache], slots, *stacked, k_scales=[k_scale], v_scales=[v_scale])


@functools.lru_cache(maxsize=MOST_POOLS)
def _constants(device: torch.device, dtype: torch.dtype, *values: float) -> Tensor:
    """On the device; made before a graph is captured, which no copy from the host may enter."""
    return torch.tensor(values, dtype=dtype, device=device)


def encode_layers(
    k_caches: list[Tensor], v_caches: list[Tensor], slots: Tensor, mean: Tensor, key_basis: Tensor, steps: Tensor,
    fields: Tensor, codes: Tensor, norms: Tensor, valid: Tensor, *, k_scales: list[float] | None = None,
    v_scales: list[float] | None = None,
) -> None:  # fmt: skip
    """GPU implementation of `vattn_kernels.ops.encode_layers`: one launch."""
    layers = len(k_caches)
    require(layers == len(v_caches) > 0, "{} K caches and {} V caches; expected one a layer", layers, len(v_caches))
    k_cache, v_cache = k_caches[0], v_caches[0]
    for k, v in zip(k_caches, v_caches, strict=True):
        _check_cache(k, v)
        require(
            k.dtype == k_cache.dtype and k.shape == k_cache.shape, "KV caches of {} and {}, shapes {} and {}",
            k.dtype, k_cache.dtype, tuple(k.shape), tuple(k_cache.shape),
        )  # fmt: skip
    check_slots(slots)
    side = {
        "codes": codes, "norms": norms, "valid": valid, "mean": mean, "key_basis": key_basis, "steps": steps,
        "fields": fields,
    }  # fmt: skip
    for name, tensor in side.items():
        require(tensor.shape[0] == layers, "{} of {} layers, KV caches of {}", name, tensor.shape[0], layers)
    ones = [1.0] * layers
    for name, scales in {"k_scales": k_scales or ones, "v_scales": v_scales or ones}.items():
        require(len(scales) == layers, "{} of {} layers, KV caches of {}", name, len(scales), layers)
    check_encoded("sketch", k_cache, **{name: tensor[0] for name, tensor in side.items()})
    for name in ("mean", "key_basis", "steps", "fields"):
        check_contiguous(name, side[name])
    if not slots.numel():
        return
    words, (_, heads, head_dim) = codes.shape[-1], k_cache.shape
    coded = _power_of_two(LANES * GROUPS_PER_WORD * words)
    pools = _constants(k_cache.device, torch.int64, *(t.data_ptr() for t in (*k_caches, *v_caches)))
    scales = _constants(k_cache.device, torch.float32, *(k_scales or ones), *(v_scales or ones))
    update_fwd_kernel[(-(-slots.numel() // 16), heads, layers)](
        k_cache, v_cache, pools, scales, slots, mean, key_basis, steps, fields, codes, norms, valid,
        slots.numel(), k_cache.stride(0), codes.stride(0), codes.stride(2), norms.stride(0), norms.stride(2),
        valid.stride(0), HKV=heads, D=head_dim, DP=_power_of_two(head_dim), R=steps.shape[-1],
        C=coded, F=min(coded, layout.LAUNCH.update_block), WORDS=words, BT=16, num_warps=4,
    )  # fmt: skip


def encode_signature(
    k_cache: Tensor, slots: Tensor, mean: Tensor, nets: Tensor, widths: Tensor, codes: Tensor, norms: Tensor,
    valid: Tensor, centred: bool,
) -> None:  # fmt: skip
    """GPU implementation of `vattn_kernels.ops.encode_signature`: one launch."""
    _check_cache(k_cache, k_cache)
    _check_scaled("sign", k_cache)
    check_slots(slots)
    _, heads, head_dim = k_cache.shape
    first, second, bits = sizes_of(widths, nets, head_dim)
    check_encoded("sign", k_cache, codes=codes, norms=norms, valid=valid, mean=mean)
    check_signatures(nets, bits, codes, heads)
    if not slots.numel():
        return
    each = nets.shape[0] // heads
    sign_keys_fwd_kernel[(-(-slots.numel() // ROWS.value), heads, each)](
        k_cache, slots, mean, nets, codes, norms, valid, slots.numel(), nets.shape[1], k_cache.stride(0),
        codes.stride(0), codes.stride(1), norms.stride(0), norms.stride(1),
        EACH=each, CENTRED=centred, D=head_dim, FIRST=first, SECOND=second, LAST=bits, num_warps=4,
    )  # fmt: skip


def encode_pages(k_cache: Tensor, v_cache: Tensor, slots: Tensor, bounds: Tensor, norms: Tensor, valid: Tensor) -> None:
    """GPU implementation of `vattn_kernels.ops.encode_pages`: two launches."""
    _check_cache(k_cache, v_cache)
    _check_scaled("quest", k_cache)
    check_slots(slots)
    check_encoded("quest", k_cache, codes=bounds, norms=norms, valid=valid)
    count, (num_slots, heads, head_dim) = slots.numel(), k_cache.shape
    if not count:
        return
    padded_dim = _power_of_two(head_dim)
    mark_slots_fwd_kernel[(-(-count // 16), heads)](
        v_cache, slots, norms, valid, count, k_cache.stride(0), norms.stride(0), norms.stride(1),
        D=head_dim, DP=padded_dim, BT=16, num_warps=4,
    )  # fmt: skip
    bound_pages_fwd_kernel[(count, heads)](
        k_cache, slots, valid, bounds, num_slots, k_cache.stride(0), bounds.stride(0), bounds.stride(1),
        D=head_dim, DP=padded_dim, num_warps=4,
    )  # fmt: skip
