"""Rotary position embedding as a known rotation: taken out of what was observed and put in at every position.

Keys are coded after RoPE, so a basis must fit the positions it will meet. The rotation is known, so second moments
observed at a few thousand positions give those at any: in complex pairs ``z``, ``E[z z^H]`` and ``E[z z^T]`` of a row
that stands at every position alike are those of the unrotated row times the mean of ``phi_f conj(phi_g)`` and
``phi_f phi_g`` (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SAMPLED_POSITIONS = (1, 16, 256, 4096)
# A cache cast to bfloat16 is off by 0.004; other bases and scalings move some pair by far more.
SAME = 0.02


@dataclass(frozen=True)
class Rope:
    """Rotation of every position.

    Attributes
    ----------
    phases : torch.Tensor
        complex128 ``[num_positions, head_dim / 2]``, factor of each pair; 1 for dimensions that are not rotated.
    first, second : torch.Tensor
        int64 ``[head_dim / 2]``, dimensions of each pair.
    """

    phases: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def from_cache(cls, cos_sin: torch.Tensor, head_dim: int, is_neox: bool) -> Rope:
        """From SGLang's ``RotaryEmbedding`` (``layers/rotary_embedding/base.py``).

        Parameters
        ----------
        cos_sin : torch.Tensor
            ``[num_positions, rotary_dim]``, cosines and then sines.
        head_dim : int
            Of K; dimensions from ``rotary_dim`` on are not rotated.
        is_neox : bool
            Pairs are halves of ``rotary_dim`` rather than neighbours.

        Raises
        ------
        ValueError
            If the dimensions do not pair up.
        """
        rotary_dim = cos_sin.shape[1]
        if rotary_dim % 2 or head_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rotary_dim {rotary_dim} and head_dim {head_dim} are not pairs of dimensions")
        device = cos_sin.device
        cos, sin = cos_sin.double().chunk(2, dim=-1)
        phases = torch.ones(cos_sin.shape[0], head_dim // 2, dtype=torch.complex128, device=device)
        phases[:, : rotary_dim // 2] = torch.complex(cos, sin)
        rotated, rest = torch.arange(rotary_dim, device=device), torch.arange(rotary_dim, head_dim, device=device)
        pairs = rotated.view(2, -1) if is_neox else rotated.view(-1, 2).T
        first, second = torch.cat([pairs, rest.view(2, -1)], dim=1)
        return cls(phases, first, second)

    @property
    def num_positions(self) -> int:
        """Positions whose rotation is known."""
        return self.phases.shape[0]

    def sample(self) -> torch.Tensor:
        """Rotation at `SAMPLED_POSITIONS`, float32 ``[n, head_dim / 2, 2]`` on the CPU, for `is_same`."""
        positions = [position for position in SAMPLED_POSITIONS if position < self.num_positions]
        return torch.view_as_real(self.phases[positions]).float().cpu()

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows as they are after RoPE.

        Parameters
        ----------
        x : torch.Tensor
            ``[..., num_tokens, num_heads, head_dim]``.
        positions : torch.Tensor
            int64 ``[num_tokens]``.

        Returns
        -------
        torch.Tensor
            float32, of x's shape.
        """
        return self._turn(x, self.phases[positions])

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows as they were before RoPE; arguments as in `rotate`."""
        return self._turn(x, 1 / self.phases[positions])

    def _turn(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        z = self._pairs(x.float()) * factors.to(torch.complex64)[:, None]
        return self._dimensions(z)

    def spread_mean(self, mean: torch.Tensor, span: int) -> torch.Tensor:
        """``E[R_m x]`` over positions ``m < span``, from ``E[x]`` ``[..., head_dim]``; float64."""
        return self._dimensions(self._pairs(mean.double()) * self.phases[:span].mean(0))

    def spread_second_moment(self, moment: torch.Tensor, span: int) -> torch.Tensor:
        """``E[R_m x x^T R_m^T]`` over positions ``m < span``.

        Parameters
        ----------
        moment : torch.Tensor
            ``[..., head_dim, head_dim]``, ``E[x x^T]`` before RoPE, or a multiple.
        span : int
            Number of positions, from 0.

        Returns
        -------
        torch.Tensor
            float64, of the moment's shape.
        """
        phases = self.phases[:span]
        apart = phases.T @ phases.conj() / phases.shape[0]  # [D/2, D/2], mean of phi_f conj(phi_g)
        together = phases.T @ phases / phases.shape[0]
        left = self._pairs(moment.double().mT)  # [.., D, D/2]: rows of x x^T, columns paired
        real, imaginary = self._pairs(left.real.mT), self._pairs(left.imag.mT)  # [.., D/2, D/2]
        hermitian = (real.real + imaginary.imag) + 1j * (imaginary.real - real.imag)
        plain = (real.real - imaginary.imag) + 1j * (imaginary.real + real.imag)
        hermitian, plain = hermitian * apart, plain * together
        out = torch.empty_like(moment, dtype=torch.float64)
        a, b = self.first, self.second
        out[..., a[:, None], a] = (hermitian + plain).real / 2
        out[..., b[:, None], b] = (hermitian - plain).real / 2
        out[..., b[:, None], a] = (hermitian + plain).imag / 2
        out[..., a[:, None], b] = (plain - hermitian).imag / 2
        return out

    def _pairs(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x[..., self.first], x[..., self.second])

    def _dimensions(self, z: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*z.shape[:-1], 2 * z.shape[-1], dtype=z.real.dtype, device=z.device)
        out[..., self.first], out[..., self.second] = z.real, z.imag
        return out


def is_same(sample: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two `Rope.sample` are of one rotation, whatever the dtypes of the caches they come from."""
    return sample.shape == other.shape and bool(((sample - other).abs() < SAME).all())
