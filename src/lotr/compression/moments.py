"""`Σ P Pᵀ` of thin matrices that come one batch after the other, and its leading directions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROUNDING = 1e-14  # of the largest energy: what is below is rounding


class SecondMoment:
    """The sum `S = Σ P Pᵀ` of thin matrices `P` `(d, m)`, in double precision.

    While there are fewer than `d` columns they are kept as they are, which is exact and small. Beyond that `S` itself
    is summed, `(d, d)`, where `d` is at most `widest`; in wider spaces the columns are replaced by their leading
    `widest` directions whenever they are twice as many, and `lost` tells the energy that this dropped.

    Args:
        d: Width of the space.
        widest: Largest `d` for which `S` is written out.

    Example:
        >>> moment = SecondMoment(6)
        >>> moment.add(torch.eye(6, 2))
        >>> vectors, energies = moment.leading()
        >>> vectors.shape, energies.tolist()
        (torch.Size([6, 2]), [1.0, 1.0])
    """

    def __init__(self, d: int, widest: int = 1024) -> None:
        self.d, self.widest, self.lost = d, widest, 0.0
        self._columns: list[Tensor] = []
        self._n_columns = 0
        self._sum: Tensor | None = None

    def add(
        self,
        P: Tensor,  # (*n, d, m)
    ) -> None:
        """Add `P Pᵀ`, of every matrix of a batch."""
        P = P.double().movedim(-2, 0).reshape(self.d, -1)
        if self._sum is not None:
            self._sum.addmm_(P, P.T)
            return
        self._columns.append(P)
        self._n_columns += P.shape[1]
        if self._n_columns <= self.d:
            return
        if self.d <= self.widest:
            self._sum = sum_of_squares(self._columns, self.d)
            self._columns = []
        elif self._n_columns > 2 * self.widest:
            columns = torch.cat(self._columns, 1)
            vectors, energies = _eigen(columns)
            vectors, energies = vectors[:, : self.widest], energies[: self.widest]
            self.lost += max(float(columns.square().sum() - energies.sum()), 0.0)
            self._columns = [vectors * energies.sqrt()]
            self._n_columns = len(energies)

    def leading(self, n: int | None = None) -> tuple[Tensor, Tensor]:  # (d, m), (m,)
        """Return at most `n` eigenvectors, by falling energy, and the energies; what is rounding is left out."""
        if self._sum is None:
            columns = torch.cat(self._columns, 1) if self._columns else torch.zeros(self.d, 0).double()
            vectors, energies = _eigen(columns)
        else:
            energies, vectors = torch.linalg.eigh(self._sum)
            energies, vectors = energies.flip(0), vectors.flip(1)
            alive = int((energies > _ROUNDING * energies[:1]).sum())
            energies, vectors = energies[:alive], vectors[:, :alive]
        most = len(energies) if n is None else min(n, len(energies))
        vectors = vectors[:, :most]
        if most:  # the library leaves the signs open
            vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        return vectors.contiguous(), energies[:most]


def sum_of_squares(matrices: Iterable[Tensor], d: int) -> Tensor:  # (d, d)
    """Return `Σ P Pᵀ`."""
    total = torch.zeros(d, d, dtype=torch.float64)
    for P in matrices:
        total.addmm_(P, P.T)
    return total


def _eigen(columns: Tensor) -> tuple[Tensor, Tensor]:  # (d, m) -> (d, q), (q,)
    """Return left singular vectors and squared singular values of a thin matrix, without those that are rounding."""
    if not columns.shape[1]:
        return columns, columns.new_zeros(0)
    Q, R = torch.linalg.qr(columns) if columns.shape[0] > columns.shape[1] else (None, columns)
    left, sigma, _ = torch.linalg.svd(R, full_matrices=False)
    energies = sigma.square()
    alive = int((energies > _ROUNDING * energies[:1]).sum())
    left = left[:, :alive]
    return (left if Q is None else Q @ left), energies[:alive]


def completed(vectors: Tensor, n: int) -> Tensor:  # (d, m) -> (d, n)
    """Return orthonormal vectors, with further ones behind them where there are fewer than `n`."""
    d, m = vectors.shape
    if m >= n:
        return vectors[:, :n]
    more = torch.linalg.qr(torch.cat([vectors, torch.eye(d, dtype=vectors.dtype)], 1)).Q[:, m:n]
    return torch.cat([vectors, more], 1)
