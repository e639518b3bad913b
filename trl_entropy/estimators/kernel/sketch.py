"""Inner products of long rows from short ones: CountSketch, one parameter block at a time (T13)."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PRIME = 2**31 - 1  # products of two residues fit into int64 on every device
_DEGREE = 4
_CHUNK = 2**24  # float64 values cast at a time


@dataclass(frozen=True)
class CountSketch:
    """(T13): phi_i = R sqrt(M) x_i, R having one random sign in each column at one random row of `dim`.

    phi_i . phi_j is unbiased for x_i' M x_j over seeds; with one seed the errors of all products are dependent. Its
    variance is (K_ii K_jj + K_ij^2 - 2 sum_d M_d^2 x_id^2 x_jd^2)/dim. Signs and places come from two cubic
    polynomials modulo 2^31 - 1, whose values at four points are independent (unbiased and with this variance up to
    dim/2^31), with coefficients from `seed` and the name of the block alone: the same on any device, in any order, on
    any number of ranks. Sources: Charikar, Chen, Farach-Colton (2002); Carter, Wegman (1979); Weinberger et al.,
    arXiv:0902.2206.
    """

    dim: int
    seed: int

    def block(
        self,
        rows: Float[Tensor, "N D"],
        name: str,
        preconditioner: Float[Tensor, "D"] | None = None,
        offset: int = 0,
    ) -> Float[Tensor, "N dim"]:
        """What one block of parameters adds to the sketch, in float64; the sketch is the sum over blocks.

        `name` must be different for each block, as blocks of one name would share their hashes. A rank that holds part
        of a block passes the `offset` of its first coordinate. `preconditioner` >= 0 is M, 1 by default. Cost O(N D),
        with O(1) memory besides rows and result. ValueError for coordinates beyond 2^31 - 2: split the block.
        """
        if offset + rows.shape[1] > _PRIME:
            raise ValueError(f"block {name!r} has {offset + rows.shape[1]} coordinates, more than 2^31 - 1: split it")
        sketch = rows.new_zeros(len(rows), self.dim, dtype=torch.float64)
        metric = rows.new_ones(rows.shape[1]) if preconditioner is None else preconditioner
        columns = _CHUNK // len(rows) + 1
        for part, weights in zip(rows.split(columns, dim=1), metric.split(columns), strict=True):
            positions = torch.arange(offset, offset + part.shape[1], device=rows.device)
            signs = self.signs(positions, name) * weights.double().sqrt()
            sketch.index_add_(1, self.buckets(positions, name), part.double() * signs)
            offset += part.shape[1]
        return sketch

    def buckets(self, positions: Int[Tensor, "D"], name: str) -> Int[Tensor, "D"]:
        """The row of R in which each coordinate has its sign."""
        return self._polynomial(positions, f"{name}/bucket") % self.dim

    def signs(self, positions: Int[Tensor, "D"], name: str) -> Float[Tensor, "D"]:
        """The sign of each coordinate, -1 or 1."""
        return (2 * (self._polynomial(positions, f"{name}/sign") % 2) - 1).double()

    def _polynomial(self, positions: Int[Tensor, "D"], purpose: str) -> Int[Tensor, "D"]:
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        value = torch.zeros_like(positions)
        for i in range(_DEGREE):
            coefficient = int.from_bytes(digest[8 * i : 8 * i + 8], "little") % _PRIME
            value = (value * positions + coefficient) % _PRIME
        return value
