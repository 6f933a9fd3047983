"""What is kept of thin matrices that come one batch after the other: second moments, and the strongest directions."""

from __future__ import annotations

import torch
from torch import Tensor

from .hooi import ROUNDING, of_gram, principal, signed


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
            columns = torch.cat(self._columns, 1)
            self._sum, self._columns = columns @ columns.T, []
        elif self._n_columns > 2 * self.widest:
            columns = torch.cat(self._columns, 1)
            vectors, energies = (leading[..., : self.widest] for leading in principal(columns))
            self.lost += max(float(columns.square().sum() - energies.sum()), 0.0)
            self._columns = [vectors * energies.sqrt()]
            self._n_columns = len(energies)

    def __iadd__(self, other: SecondMoment) -> SecondMoment:
        """Add the sum of other matrices of the same width."""
        if other._sum is None:
            for columns in other._columns:
                self.add(columns)
        else:
            own, self._columns, self._n_columns = self._columns, [], 0
            self._sum = other._sum if self._sum is None else self._sum + other._sum
            for columns in own:
                self.add(columns)
        self.lost += other.lost
        return self

    def leading(self, n: int | None = None) -> tuple[Tensor, Tensor]:  # (d, m), (m,)
        """Return at most `n` eigenvectors, by falling energy, and the energies; what is rounding is left out."""
        if self._sum is not None:
            vectors, energies = of_gram(self._sum)
        elif self._columns:
            self._columns = [torch.cat(self._columns, 1)]
            vectors, energies = principal(self._columns[0])
        else:
            return torch.zeros(self.d, 0).double(), torch.zeros(0).double()
        return signed(vectors[:, :n]), energies[:n]


class Strongest:
    """The strongest of the singular directions that updates have, each by itself.

    Args:
        n: Most of them.
        widths: Of the two sides, `(K, L)`.

    Example:
        >>> strongest = Strongest(3, (6, 5))
        >>> strongest.add(torch.eye(6, 2)[None], torch.eye(2, 5)[None])
        >>> strongest.U.shape, strongest.V.shape, strongest.energies.tolist()
        (torch.Size([6, 2]), torch.Size([5, 2]), [1.0, 1.0])
    """

    def __init__(self, n: int, widths: tuple[int, int]) -> None:
        self.n = n
        self.U, self.V = (torch.zeros(width, 0).double() for width in widths)
        self.energies = torch.zeros(0).double()

    def add(
        self,
        B: Tensor,  # (n, K, q)
        A: Tensor,  # (n, q, L)
    ) -> None:
        """Take in some updates."""
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
        u, s, vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        self._take(Q_B @ u, Q_A @ vh.mT, s.square())

    def _take(self, U: Tensor, V: Tensor, energies: Tensor) -> None:
        falling, order = torch.cat([self.energies, energies.flatten()]).sort(descending=True, stable=True)
        alive = int((falling[: self.n] > ROUNDING * falling[:1]).sum())  # what is below is rounding
        order, self.energies = order[:alive], falling[:alive].clone()
        for side, new in (("U", U), ("V", V)):
            columns = new.movedim(-2, 0).flatten(1)
            setattr(self, side, torch.cat([getattr(self, side), columns], 1)[:, order])

    def __iadd__(self, other: Strongest) -> Strongest:
        """Take in what others kept."""
        self._take(other.U, other.V, other.energies)
        return self
