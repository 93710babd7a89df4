"""Constants that the GPU kernels share, and the workspace they hand results through.

Every kernel's grid and every buffer's size follow from the batch and the widest page table, so a step can be captured
in a CUDA graph. ``row`` is one (request, KV head); a ``split`` of a row takes every n-th block of its tokens, each warp
into a list of its own, and attends to these lists; one more split attends to sink and window and surveys the lists.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vattn_kernels.checks import STATS
from vattn_kernels.sketch import GROUPS_PER_WORD, LANE_BITS

LOG2E: Final = tl.constexpr(1.4426950408889634)

# What a row does in a round.
DONE: Final = tl.constexpr(0)
SAMPLED: Final = tl.constexpr(1)
DENSE: Final = tl.constexpr(2)
EXHAUSTED: Final = tl.constexpr(3)

# Columns of ``state``: log-scale of a head relative to its fixed set's log-sum-exp, context it was learnt at (0 for
# never), expected reads of its group.
STATE_SCALE: Final = tl.constexpr(0)
STATE_CONTEXT: Final = tl.constexpr(1)
STATE_READS: Final = tl.constexpr(2)

# Columns of ``stats``.
NUM_STATS: Final = tl.constexpr(len(STATS))
DENSITY: Final = tl.constexpr(STATS.index("density"))
BUDGET: Final = tl.constexpr(STATS.index("budget"))
HALF_WIDTH: Final = tl.constexpr(STATS.index("half_width"))
OUTCOME: Final = tl.constexpr(STATS.index("outcome"))
RESIDUAL_MASS: Final = tl.constexpr(STATS.index("residual_mass"))

# Rows of a split's scalars.
MAXIMUM: Final = tl.constexpr(0)
MASS: Final = tl.constexpr(1)
SQUARE: Final = tl.constexpr(2)
SPREAD: Final = tl.constexpr(3)
NUM_SCALARS: Final = tl.constexpr(4)

# Order of vattn_kernels.quantiles.TARGETS.
OUTPUT: Final = tl.constexpr(0)
DENOMINATOR: Final = tl.constexpr(1)
NUMERATOR: Final = tl.constexpr(2)

# Columns of ``scale``, one row a group: ln and log2 units of an integer score, log2 weight of a squared coding error,
# least inclusion probability.
UNIT: Final = tl.constexpr(0)
CODING: Final = tl.constexpr(1)
FLOOR: Final = tl.constexpr(2)
NUM_SCALES: Final = tl.constexpr(4)

# Columns of ``plan``, one row a row, sampler ``uniform`` only: rank of the last of the top-k, the last position that
# ties with it, their number, tokens sampled of the rest, splits that attend to the top-k, heads that the cap cuts.
THRESHOLD: Final = tl.constexpr(0)
LAST_TIE: Final = tl.constexpr(1)
TOP_K: Final = tl.constexpr(2)
SAMPLE_SIZE: Final = tl.constexpr(3)
SPLIT_BORDER: Final = tl.constexpr(4)
CUT_HEADS: Final = tl.constexpr(5)
NUM_PLANS: Final = tl.constexpr(8)

CODE_BITS: Final = tl.constexpr(LANE_BITS)

# By its own scores each of G heads asks for at least 1 / (G SHARES) of what its group reads: below that its codes may
# miss what it attends to, of which no half-width tells, kernels/benchmarks/RESULTS.md.
SHARES: Final = tl.constexpr(4)

# A block of tokens by warp: each of the LISTS warps takes REPEATS runs of RUN tokens, one a lane, into its own list.
REPEATS: Final = tl.constexpr(4)
LISTS: Final = tl.constexpr(4)
RUN: Final = tl.constexpr(32)
BLOCK: Final = REPEATS.value * LISTS.value * RUN.value
MOST_SPLITS: Final = 64
LEAST_SPLITS: Final = 4
# Splits of all rows, at most, of the rounds that few rows take part in.
MOST_TAIL: Final = 8192
MOST_LISTS: Final = LISTS.value * MOST_SPLITS
# Numbers of a list's entry: a slot and its inclusion probability, side by side so that one store writes both.
ENTRY: Final = tl.constexpr(2)
# So many serve every usual batch with one compiled kernel, see `padded_rows`.
LEAST_ROWS: Final = 1024


@dataclass
class Launch:
    """How kernels are launched; the figures behind the choices are in ``kernels/benchmarks/RESULTS.md``.

    ``tail_items`` are about how many splits of the rows that are open the rounds after the first make; tiles of exact
    attention have ``exact_tile`` numbers at most; a warp merges ``combine_splits`` splits. ``overlap`` is off only to
    time or compare launches one by one, see `launches_overlap`.
    """

    programs: int = 1024
    overlap: bool = True
    tail_items: int = 1024
    prepare_warps: int = 4
    prepare_block: int = 32
    update_block: int = 32
    select_registers: int | None = 64
    attend_block: int = 32
    attend_registers: int | None = 168
    combine_splits: int = 16
    uniform_warps: int = 8
    exact_tile: int = 128 * 128
    exact_stages: int = 3


LAUNCH: Final = Launch()
# Coded dimensions of the widest sketch: 128 bits in groups of four.
MOST_CODES: Final = 4 * GROUPS_PER_WORD * 4


def surveyed(group: int) -> int:
    """Tokens of a row that tell what its heads ask for, a power of two: eight of a head that asks for the least."""
    return max(64, 8 * SHARES.value << (group - 1).bit_length())


def gluon_serves(device: torch.device) -> bool:
    """Whether Gluon kernels serve the first round where they can; Triton interprets none.

    Parameters
    ----------
    device : torch.device
        Where the cache lives.
    """
    return device.type == "cuda"


def tensor_cores_score(group: int, words: int) -> bool:
    """Whether `select_gluon` serves the first round: the queries' tiles fit a thread's registers."""
    return group * words <= 16


def select_registers(group: int, words: int) -> int | None:
    """Registers a thread of ``select``: eight programs a multiprocessor, while the queries' tiles fit them."""
    return LAUNCH.select_registers if group <= 4 and words <= 2 else None


def attend_registers(width: int, head_dim: int) -> int | None:
    """Registers a thread of ``attend``: three programs a multiprocessor, while the output's tile fits them."""
    return LAUNCH.attend_registers if width * head_dim <= 16 * 128 else None


def exact_block(head_dim: int) -> int:
    """Tokens of a tile of exact attention."""
    return min(128, LAUNCH.exact_tile // head_dim)


def finish_shared(head_dim: int) -> int:
    """Bytes of a multiprocessor that hold two programs of ``finish``, with what CUDA keeps for each."""
    return (164 if head_dim <= 128 else 171) << 10


def finish_programs(device: torch.device, head_dim: int) -> int:
    """Programs of ``finish`` that run at once on a multiprocessor: as many as its memory holds, see `carveout`."""
    return 2 if shared_memory(device) >= finish_shared(head_dim) else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor of a GPU; 0 elsewhere.

    Parameters
    ----------
    device : torch.device
        Where the cache lives.
    """
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor if device.type == "cuda" else 0


def one_warp_attends(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether `attend_gluon` serves the first round: tiles fit a warp, bfloat16 holds a variance's weights."""
    return dtype == torch.bfloat16 and head_dim in (64, 128) and group <= 4


def launches_overlap(device: torch.device) -> bool:
    """Whether programs of a launch may start before the one ahead has ended: CUDA's programmatic dependent launch.

    Parameters
    ----------
    device : torch.device
        Where the cache lives; it takes sm_90.
    """
    return LAUNCH.overlap and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def splits_of(rows: int) -> int:
    """Splits a row: enough to fill the device, a power of two.

    Parameters
    ----------
    rows : int
        Requests times KV heads.
    """
    wanted = 1 << max(0, math.ceil(math.log2(LAUNCH.programs / max(rows, 1))))
    return min(max(wanted, LEAST_SPLITS), MOST_SPLITS)


def combine_warps(splits: int) -> int:
    """Warps that merge the splits of one head."""
    return max(1, splits // LAUNCH.combine_splits)


def tail_splits_of(rows: int, max_len: int) -> int:
    """Splits a row, at most, after the first round: few rows are left then, and more programs shorten each.

    Parameters
    ----------
    rows : int
        Requests times KV heads.
    max_len : int
        Width of the page table.
    """
    wanted = min(max_len // BLOCK, MOST_TAIL // max(rows, 1), MOST_SPLITS)
    return max(1 << max(0, wanted.bit_length() - 1), LEAST_SPLITS)


def padded_rows(rows: int) -> int:
    """Modes that ``finish`` loads to find the rows that are open: a power of two, those of all rows at least."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


@functools.cache
def programs_at_once(device: torch.device, each: int) -> int:
    """Programs that run at once on a GPU, ``each`` a multiprocessor; an interpreter runs one after the other."""
    return each * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass
class Workspace:
    """Buffers of one device, reused by every layer.

    Attributes
    ----------
    mode : torch.Tensor
        int32 ``[padded_rows(rows)]``, what a row does in the coming round.
    codes : torch.Tensor
        int8 ``[rows * group, fields]``, the query in the sketch's coordinates.
    query : torch.Tensor
        float32 ``[rows * group, 2 * head_dim]``, the query as the other selectors read it, see `estimate`.
    bias, log_scale, fixed : torch.Tensor
        float32 ``[rows * group]``: constant part of the estimated logits, log-scale of the sampling probabilities,
        log-sum-exp over sink and window.
    scale : torch.Tensor
        float32 ``[rows, NUM_SCALES]``.
    entries : torch.Tensor
        int32 ``[rows * capacity, 2]``, slots of the tokens selected and the bits of their inclusion probabilities.
    heads : torch.Tensor
        float32 ``[rows * group, 4]``, half-width, guard, first scale and residual mass of a head.
    arrivals : torch.Tensor
        int32 ``[rows]``, heads of a row that are done; 0 between launches.
    used : torch.Tensor
        int32 ``[1]``, splits a row that is read whole.
    listed : torch.Tensor
        int32 ``[rows, MOST_SPLITS]``, 1 once the first round has selected a split, see `await_signals`.
    attended : torch.Tensor
        int32 ``[rows]``, splits that the first round has attended to.
    barrier : torch.Tensor
        int32 ``[2]``, see `vattn_kernels.triton.finish.await_all`; the first is 0 between launches.
    asked : torch.Tensor
        float32 ``[rows * group]``, share of the first round's expected reads that a head's own scores ask for, see
        `survey`; once the round is settled, how many tokens that is at a second round's scale.
    counts, reads : torch.Tensor
        int32 and float32 ``[rows, MOST_LISTS]``, tokens selected and their expected number, by list.
    outs, scalars : torch.Tensor
        float32 ``[rows * (splits + 1), width, head_dim]`` and ``[.., NUM_SCALARS, width]``, partial results.
    """

    mode: torch.Tensor
    codes: torch.Tensor
    query: torch.Tensor
    bias: torch.Tensor
    log_scale: torch.Tensor
    fixed: torch.Tensor
    scale: torch.Tensor
    entries: torch.Tensor
    heads: torch.Tensor
    asked: torch.Tensor
    arrivals: torch.Tensor
    used: torch.Tensor
    listed: torch.Tensor
    attended: torch.Tensor
    barrier: torch.Tensor
    counts: torch.Tensor
    reads: torch.Tensor
    outs: torch.Tensor
    scalars: torch.Tensor


@dataclass
class Ranking:
    """Buffers of one device that sampler ``uniform`` takes beside the `Workspace`.

    Attributes
    ----------
    ranks : torch.Tensor
        int32 ``[rows, capacity]``, unsigned numbers in the order of the scores.
    plan : torch.Tensor
        int32 ``[rows, NUM_PLANS]``.
    """

    ranks: torch.Tensor
    plan: torch.Tensor


_workspaces: dict[torch.device, tuple[tuple[int, ...], Workspace]] = {}
_rankings: dict[torch.device, Ranking] = {}
# Captured graphs hold the addresses of what was too small for a later call.
_outgrown: list[Workspace | Ranking] = []


def width_of(group: int) -> int:
    """Rows of a tensor-core tile that serves one group: its heads, and their variances."""
    return max(16, 1 << (2 * group - 1).bit_length())


def capacity(rows: int, max_len: int) -> int:
    """Entries of a row's lists, whole blocks for every split."""
    span = BLOCK * max(splits_of(rows), tail_splits_of(rows, max_len))
    return -(-max_len // span) * span


@functools.lru_cache(maxsize=4096)
def _size(batch: int, max_len: int, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Rows, heads, list entries, splits, tile rows and head_dim that serve every batch up to this one."""
    rows, group = batch * num_kv_heads, num_qo_heads // num_kv_heads
    batches = range(num_kv_heads, rows + 1, num_kv_heads)
    entries = max(r * capacity(r, max_len) for r in batches)
    splits = max(r * (max(splits_of(r), tail_splits_of(r, max_len)) + 1) for r in batches)
    return rows, rows * group, entries, splits, width_of(group), head_dim


def _check_growth(device: torch.device, have: tuple[int, ...], size: tuple[int, ...]) -> None:
    """Refuse to allocate while a CUDA graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"vattn: the workspace on {device} holds batch x heads x context of {have} and a capture needs {size}; "
            "call vattn_kernels.ops.reserve with the sampler and the largest batch and context first"
        )


def ranking(device: torch.device, work: Workspace) -> Ranking:
    """What sampler ``uniform`` takes beside a workspace, made anew only when it is too small.

    Parameters
    ----------
    device : torch.device
        Where the buffers live.
    work : Workspace
        Of the step.

    Raises
    ------
    RuntimeError
        As `workspace` does.
    """
    size = work.entries.shape[0], work.mode.numel() * NUM_PLANS.value
    found = _rankings.get(device)
    have = (0, 0) if found is None else (found.ranks.numel(), found.plan.numel())
    if found is None or have[0] < size[0] or have[1] < size[1]:
        _check_growth(device, have, size)
        if found is not None:
            _outgrown.append(found)
        found = Ranking(*(torch.empty(count, dtype=torch.int32, device=device) for count in size))
        _rankings[device] = found
    return found


def workspace(
    device: torch.device, batch: int, max_len: int, num_qo_heads: int, num_kv_heads: int, head_dim: int
) -> Workspace:
    """The device's workspace, made anew only when it is too small; steps on it must follow each other on one stream.

    Parameters
    ----------
    device : torch.device
        Where the buffers live.
    batch, max_len : int
        Largest batch and page table.
    num_qo_heads, num_kv_heads, head_dim : int
        Of the model on this rank.

    Raises
    ------
    RuntimeError
        If it would have to grow while a CUDA graph is captured: reserve it before.
    """
    size = _size(batch, max_len, num_qo_heads, num_kv_heads, head_dim)
    have, found = _workspaces.get(device, ((0,) * 6, None))
    if found is not None and all(w <= h for w, h in zip(size, have, strict=True)):
        return found
    _check_growth(device, have, size)
    if found is not None:
        _outgrown.append(found)
    rows, heads, entries, splits, width, dim = (max(w, h) for w, h in zip(size, have, strict=True))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    made = Workspace(
        empty(padded_rows(rows), dtype=torch.int32),
        empty(heads, MOST_CODES, dtype=torch.int8),
        empty(heads, 2 * dim),
        empty(heads),
        empty(heads),
        empty(heads),
        empty(rows, NUM_SCALES.value),
        empty(entries, ENTRY.value, dtype=torch.int32),
        empty(heads, 4),
        empty(heads),
        torch.zeros(rows, dtype=torch.int32, device=device),
        empty(1, dtype=torch.int32),
        empty(rows, MOST_SPLITS, dtype=torch.int32),
        empty(rows, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.zeros(rows, MOST_LISTS, dtype=torch.int32, device=device),
        empty(rows, MOST_LISTS),
        empty(splits, width, dim),
        empty(splits, NUM_SCALARS.value, width),
    )
    _workspaces[device] = ((rows, heads, entries, splits, width, dim), made)
    return made


@triton.jit
def sampled_range(n, sink, window):
    """First position behind the sink, and first of the window: what is drawn from lies between them."""
    low = tl.minimum(sink, n)
    return low, tl.maximum(n - window, low)


@triton.jit
def is_padding(n):
    """Whether a row has one token or none: a graph runner fills a batch with such, a request that decodes has two."""
    return n <= 1


@triton.jit
def probabilities_of(p_entries):
    """Pointer to the first entry's probability."""
    return (p_entries + 1).to(tl.pointer_type(tl.float32))


@triton.jit
def store_entries(p_entries, place, slot, pi, mask):
    """Store entries of lists."""
    tl.store(p_entries + ENTRY * place, slot, mask=mask)
    tl.store(probabilities_of(p_entries) + ENTRY * place, pi, mask=mask)


@triton.jit
def begin_next(DEPENDENT: tl.constexpr):
    """Let the next launch's programs start once all of this launch have: each runs up to its `await_last`."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def await_last(DEPENDENT: tl.constexpr):
    """Wait for the end of the launch ahead, and so of all before; what they store may be loaded from here on."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def signal(p_signals, DEPENDENT: tl.constexpr):
    """Count that this program has stored all; what waits for it may then load that."""
    if DEPENDENT:
        tl.debug_barrier()
        tl.atomic_add(p_signals, 1, sem="release")


@triton.jit
def await_signals(p_signals, number, DEPENDENT: tl.constexpr):
    """Wait for ``number`` programs of the launch ahead in place of all of them, as `await_last` does.

    They run already, as a launch starts once every program ahead has called `begin_next`. ``select`` calls that when
    ``prepare``, which clears the signals, has ended.
    """
    if DEPENDENT:
        while tl.atomic_add(p_signals, 0, sem="acquire") < number:
            pass
        tl.debug_barrier()


@triton.jit
def await_each(p_signals, o_n, number, DEPENDENT: tl.constexpr):
    """`await_signals` for programs that count to 1 at an address each, ``p_signals + o_n`` ``[number]``."""
    if DEPENDENT:
        while tl.sum(tl.atomic_add(p_signals + o_n, o_n * 0, sem="acquire"), 0) < number:
            pass
        tl.debug_barrier()
