"""Query-weighted PCA codes of keys: how a sketch is calibrated and how its fields are laid out.

``C = E[q q^T] = L L^T`` over calibration queries and ``(K - mean) L = U S Vh`` give the best rank-r form of ``q . k``
for the queries that come (``algorithm.md``, "Sketch"). A key becomes ``z = (k - mean) L Vh^T`` with a few bits a
dimension, given out by water-filling; a query becomes ``t = q L^-T Vh^T``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from vattn_kernels.rope import Rope

MAX_WIDTH = 5
WORD_BITS = 32
LANES = 4
# Of a word, for one dimension of each of its groups.
LANE_BITS = WORD_BITS // LANES
GROUPS_PER_WORD = 3
NORM_STEPS_PER_OCTAVE = 8
NORM_ZERO = 128
# Error byte of a slot whose side data must not be used, where no valid byte is read.
UNUSABLE = 255
# Step, in standard deviations, of the uniform quantizer with least error on a Gaussian, for widths 1 to 5.
GAUSSIAN_STEPS = (1.596, 0.9957, 0.586, 0.3352, 0.1881)
STEP_CANDIDATES = (0.7, 0.85, 1.0, 1.2)
RIDGE = 1e-4


@dataclass
class Moments:
    """Running second moments of queries and keys; float32, on the model's device.

    Attributes
    ----------
    qq : torch.Tensor
        ``[num_layers, num_kv_heads, head_dim, head_dim]`` sum of ``q q^T`` over the group's heads.
    kk : torch.Tensor
        Same shape, sum of ``k k^T``.
    k : torch.Tensor
        ``[num_layers, num_kv_heads, head_dim]`` sum of ``k``.
    q_count, k_count : torch.Tensor
        ``[num_layers]`` number of rows in the sums.
    """

    qq: torch.Tensor
    kk: torch.Tensor
    k: torch.Tensor
    q_count: torch.Tensor
    k_count: torch.Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device | str) -> Moments:
        """Empty moments."""
        matrix = (num_layers, num_kv_heads, head_dim, head_dim)
        return cls(
            torch.zeros(matrix, device=device),
            torch.zeros(matrix, device=device),
            torch.zeros(matrix[:3], device=device),
            torch.zeros(num_layers, device=device),
            torch.zeros(num_layers, device=device),
        )

    def add(self, layer_id: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """Add one layer's rows.

        Parameters
        ----------
        layer_id : int
            Index of the layer.
        q : torch.Tensor
            ``[num_tokens, num_qo_heads, head_dim]``.
        k : torch.Tensor
            ``[num_tokens, num_kv_heads, head_dim]``.
        """
        num_kv_heads, head_dim = self.k.shape[1:]
        q = q.reshape(q.shape[0], num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        q, k = q.float(), k.transpose(0, 1).float()  # [H, T*G, D], [H, T, D]
        self.qq[layer_id].baddbmm_(q.transpose(1, 2), q)
        self.kk[layer_id].baddbmm_(k.transpose(1, 2), k)
        self.k[layer_id] += k.sum(1)
        self.q_count[layer_id] += q.shape[1]
        self.k_count[layer_id] += k.shape[1]

    def at_positions(self, rope: Rope, span: int) -> Moments:
        """Moments of the same rows if each stood at every position below ``span``.

        Parameters
        ----------
        rope : Rope
            The model's rotation; the rows were added without it.
        span : int
            Number of positions.

        Returns
        -------
        Moments
            float64.
        """
        return Moments(
            rope.spread_second_moment(self.qq, span),
            rope.spread_second_moment(self.kk, span),
            rope.spread_mean(self.k, span),
            self.q_count,
            self.k_count,
        )


@dataclass
class SketchTables:
    """What encoding and scoring need, stacked over layers.

    Attributes
    ----------
    mean : torch.Tensor
        float32 ``[num_layers, num_kv_heads, head_dim]``, subtracted from keys.
    key_basis : torch.Tensor
        float32 ``[num_layers, num_kv_heads, head_dim, head_dim]``, ``L Vh^T``: ``z = (k - mean) @ key_basis``.
    query_basis : torch.Tensor
        Same shape, ``L^-T Vh^T``: ``t = q @ query_basis``.
    steps : torch.Tensor
        float32 ``[num_layers, num_kv_heads, max_fields]``, quantizer step of each coded dimension.
    fields : torch.Tensor
        int32 ``[num_layers, num_kv_heads, max_fields, 3]``: word, shift, width; width 0 is unused. By lanes,
        dimensions ``4j .. 4j + 3`` have one width and lie in the four bytes of word ``j % words`` at the same shift
        within the byte, so that one shift and mask yields four codes for a dot product of bytes;
        ``j < GROUPS_PER_WORD * words``. That many groups of a word fill it, so the last ends at the top of its byte.
    """

    mean: torch.Tensor
    key_basis: torch.Tensor
    query_basis: torch.Tensor
    steps: torch.Tensor
    fields: torch.Tensor

    def to(self, device: torch.device | str) -> SketchTables:
        """Copy on another device."""
        return SketchTables(**{f.name: getattr(self, f.name).to(device).contiguous() for f in fields(self)})

    def copy_(self, other: SketchTables) -> None:
        """Overwrite in place, so that captured graphs keep their addresses."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))

    @classmethod
    def zeros(
        cls, num_layers: int, num_kv_heads: int, head_dim: int, bits: int, device: torch.device | str
    ) -> SketchTables:
        """Tables of a sketch that is not calibrated yet."""
        rows, slots = (num_layers, num_kv_heads), max_fields(bits, head_dim)
        return cls(
            torch.zeros(*rows, head_dim, device=device),
            torch.zeros(*rows, head_dim, head_dim, device=device),
            torch.zeros(*rows, head_dim, head_dim, device=device),
            torch.zeros(*rows, slots, device=device),
            torch.zeros(*rows, slots, 3, device=device, dtype=torch.int32),
        )


def max_fields(bits: int, head_dim: int) -> int:
    """Largest number of coded dimensions of a sketch of ``bits`` bits."""
    return min(head_dim, bits)


def check_fields(fields: torch.Tensor, bits: int, lanes: bool = False) -> None:
    """Refuse fields that are not laid out as `SketchTables` says; the kernels index by them unchecked.

    Parameters
    ----------
    fields : torch.Tensor
        int32 ``[num_layers, num_kv_heads, max_fields, 3]``.
    bits : int
        Of one code.
    lanes : bool
        As in `solve`.

    Raises
    ------
    ValueError
        If a width is not one of this layout, or a field lies elsewhere.
    """
    words = bits // WORD_BITS
    width = fields[..., 2]
    if ((width < 0) | (width > MAX_WIDTH)).any():
        raise ValueError(f"fields wider than {MAX_WIDTH} bits")
    if lanes and width[..., GROUPS_PER_WORD * words * LANES :].any():
        raise ValueError(f"more than {GROUPS_PER_WORD} groups in a word")
    for row in fields.flatten(0, 1).tolist():
        widths = [entry[2] for entry in row]
        if lanes and widths != [w for w in widths[::LANES] for _ in range(LANES)]:
            raise ValueError("groups of unequal widths")
        if row != (_pack_lanes if lanes else _pack)(widths, words):
            raise ValueError("fields of another layout")
        for own in (widths[word * LANES :: words * LANES][:GROUPS_PER_WORD] for word in range(words if lanes else 0)):
            has_all = len(own) == GROUPS_PER_WORD and own[-1] > 0
            if sum(own) > LANE_BITS or (has_all and sum(own) < LANE_BITS):
                raise ValueError(f"groups of {own} bits in a byte of {LANE_BITS}")


def solve(moments: Moments, key_sample: torch.Tensor, bits: int, lanes: bool = False) -> SketchTables:
    """Bases, widths and steps of the codes.

    Parameters
    ----------
    moments : Moments
        Of calibration queries and keys, as they are after RoPE.
    key_sample : torch.Tensor
        ``[num_layers, num_samples, num_kv_heads, head_dim]`` keys on which quantizer steps are chosen.
    bits : int
        Bits of one code, a multiple of 32.
    lanes : bool
        Whether dimensions lie in groups of four as a GPU reads them, see `SketchTables`; apart they lose less.

    Returns
    -------
    SketchTables
    """
    num_layers, num_kv_heads, head_dim = moments.k.shape
    eye = torch.eye(head_dim, dtype=torch.float64, device=moments.k.device)
    qq = moments.qq.double() / moments.q_count.double().clamp(min=1)[:, None, None, None]
    qq += RIDGE * qq.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-12) * eye
    count = moments.k_count.double().clamp(min=1)[:, None, None]
    mean = moments.k.double() / count
    covariance = moments.kk.double() / count[..., None] - mean[..., :, None] * mean[..., None, :]
    factor = torch.linalg.cholesky(qq)  # [L, H, D, D], C = L L^T
    energy, vectors = torch.linalg.eigh(factor.mT @ covariance @ factor)
    vectors = vectors.flip(-1)  # [L, H, D, D], columns by falling energy
    sigma = energy.flip(-1).clamp(min=0).sqrt()
    key_basis = factor @ vectors
    query_basis = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)

    slots = max_fields(bits, head_dim)
    centred = key_sample.transpose(1, 2).double() - mean[:, :, None]
    z = (centred @ key_basis[..., :slots]).float()  # [L, H, n, R]
    steps, errors = _quantizers(z, sigma[..., :slots].float())
    words = bits // WORD_BITS
    widths = _water_fill_lanes(errors, words) if lanes else _water_fill(errors, bits)
    place = _pack_lanes if lanes else _pack
    packed = torch.zeros(num_layers, num_kv_heads, slots, 3, dtype=torch.int32)
    for layer in range(num_layers):
        for head in range(num_kv_heads):
            packed[layer, head] = torch.tensor(place(widths[layer, head].tolist(), words))
    chosen = (packed[..., 2].long() - 1).clamp(min=0).to(steps.device)
    return SketchTables(
        mean.float(),
        key_basis.float().contiguous(),
        query_basis.float().contiguous(),
        steps.gather(-1, chosen[..., None])[..., 0].contiguous(),
        packed.to(steps.device),
    )


def _quantizers(z: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best step and its mean squared error for every dimension and width: ``[L, H, R, W]`` and ``[L, H, R, W + 1]``."""
    errors = [z.square().mean(2)]
    steps = []
    for width, unit in enumerate(GAUSSIAN_STEPS, start=1):
        trials = []
        for candidate in STEP_CANDIDATES:
            step = (candidate * unit * sigma).clamp(min=1e-12)[:, :, None]
            half = 1 << (width - 1)
            code = (z / step).floor().clamp(-half, half - 1)
            trials.append(((code + 0.5) * step - z).square().mean(2))
        best = torch.stack(trials, -1).min(-1)
        errors.append(best.values)
        steps.append(torch.tensor(STEP_CANDIDATES, device=z.device)[best.indices] * unit * sigma)
    return torch.stack(steps, -1).clamp(min=1e-12), torch.stack(errors, -1)


def _water_fill(errors: torch.Tensor, bits: int) -> torch.Tensor:
    """Give out bits one by one where they lower the error most; ``[L, H, R]`` int64."""
    gains = _gains(errors)
    widths = torch.zeros(errors.shape[:-1], dtype=torch.int64, device=errors.device)
    for _ in range(bits):
        _widen(gains, widths)
    return widths


def _water_fill_lanes(errors: torch.Tensor, words: int) -> torch.Tensor:
    """The same for groups of `LANES` dimensions, each in the word that its number gives it; ``[L, H, R]`` int64."""
    groups = min(GROUPS_PER_WORD * words, errors.shape[2] // LANES)
    gains = _gains(errors[:, :, : groups * LANES].unflatten(2, (groups, LANES)).sum(3))
    widths = torch.zeros(gains.shape[:-1], dtype=torch.int64, device=errors.device)
    # Rare keys far out on the first dimensions cost most, and a sample's mean squared error hardly shows them.
    widths[..., 0] = MAX_WIDTH
    for word in range(words):
        own = widths[..., word::words]
        for _ in range(LANE_BITS - (MAX_WIDTH if word == 0 else 0) if own.shape[-1] else 0):
            _widen(gains[..., word::words, :], own)
    widths = widths.repeat_interleave(LANES, -1)
    return torch.nn.functional.pad(widths, (0, errors.shape[2] - widths.shape[-1]))


def _gains(errors: torch.Tensor) -> torch.Tensor:
    """What one bit more saves, by width; negative past the widest."""
    gains = (errors[..., :-1] - errors[..., 1:]).clamp(min=0)
    return torch.cat([gains, torch.full_like(gains[..., :1], -1.0)], -1)


def _widen(gains: torch.Tensor, widths: torch.Tensor) -> None:
    """Give one bit to the best of each row that has room, in place."""
    best = gains.gather(-1, widths[..., None])[..., 0].max(-1, keepdim=True)
    widths.scatter_add_(-1, best.indices, (best.values >= 0).long())


def _pack(widths: list[int], words: int) -> list[list[int]]:
    """Place fields into words, widest first, none across a border; a field that does not fit is narrowed."""
    free = [WORD_BITS] * words
    placed = [[0, 0, 0] for _ in widths]
    for index in sorted(range(len(widths)), key=lambda i: -widths[i]):
        word = max(
            range(words), key=lambda w: (free[w] >= widths[index], -free[w] if free[w] >= widths[index] else free[w])
        )
        width = min(widths[index], free[word])
        placed[index] = [word, WORD_BITS - free[word], width]
        free[word] -= width
    return placed


def _pack_lanes(widths: list[int], words: int) -> list[list[int]]:
    """Place groups: four bytes of one word, one shift within the byte."""
    used = [0] * words
    placed = []
    for index, width in enumerate(widths):
        group, lane = divmod(index, LANES)
        word = group % words
        placed.append([word, 8 * lane + used[word], width] if width else [0, 0, 0])
        if lane == LANES - 1:
            used[word] += width
    return placed
