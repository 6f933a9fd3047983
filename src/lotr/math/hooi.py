"""The subspaces in which the matrices of a group's sites lie: Tucker-2 of a stack that nobody builds.

For matrices `M_s` of shape `(o, i)`, one a site, orthonormal `U` and `V` maximise `Σ_s w_s² ‖Uᵀ M_s V‖²`. Only products
`M_s V` and `M_sᵀ U` are ever needed, so `M_s` may be a sum over batches (`Subspaces`) or a product of thin matrices
(`tucker2`).

Source: HOSVD and HOOI (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .init import orthonormal

_MORE = 8  # columns beyond the rank: they make the first, random round as good as the exact one
ROUNDING = 1e-14  # of the largest energy: what is below is rounding


class Subspaces:
    """Factors of one group that turn towards matrices of which each pass over data shows products alone.

    The first round multiplies by random columns (a sketch, which gives the HOSVD), every further round is one of HOOI.

    Args:
        shape: Block `(o, i)`.
        rank: `(k, r)`.
        generator: CPU generator of the random start.
        normalise: Weigh every site by one over its norm, so that no site outshouts the others.

    Example:
        >>> spaces = Subspaces((6, 5), (2, 3), torch.Generator().manual_seed(0))
        >>> M = torch.randn(6, 5)
        >>> for _ in range(3):
        ...     spaces.turn([M @ spaces.V], [M.T @ spaces.U])
        >>> U, V = spaces.factors()
        >>> U.shape, V.shape
        (torch.Size([6, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self, shape: tuple[int, int], rank: tuple[int, int], generator: Generator, normalise: bool = True
    ) -> None:
        (o, i), (self.k, self.r) = shape, rank
        self.normalise = normalise
        self.U = orthonormal(o, min(o, max(rank) + _MORE), generator)
        self.V = orthonormal(i, min(i, max(rank) + _MORE), generator)
        self._weights: tuple[Tensor, Tensor] | None = None  # of each site, from the random round

    def turn(
        self,
        left: Sequence[Tensor],  # M_s V, each (o, q)
        right: Sequence[Tensor],  # M_sᵀ U, each (i, q)
    ) -> None:
        """Take the leading directions of the products as the new factors."""
        if self._weights is None:
            self._weights = self._weigh(left), self._weigh(right)
        weighted = [
            torch.cat([w * P for w, P in zip(weights, products, strict=True)], dim=1)
            for weights, products in zip(self._weights, (left, right), strict=True)
        ]
        self.U, self.V = leading(weighted[0], self.U), leading(weighted[1], self.V)

    def _weigh(self, products: Sequence[Tensor]) -> Tensor:  # (sites,)
        norms = torch.stack([P.norm() for P in products])
        alive = norms > 1e-6 * norms.max()
        weights = 1 / norms.where(alive, torch.ones_like(norms)) if self.normalise else torch.ones_like(norms)
        return weights * alive

    def factors(self) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
        """Return `U` and `V`, orthonormal."""
        return self.U[:, : self.k].contiguous(), self.V[:, : self.r].contiguous()


class FirstStep:
    """Factors and cores from what a first step of AdamW would change: `−η · sign(G_s)`, each gradient seen whole.

    Of one site the factors are the leading singular vectors of that step and the core their values; several sites share
    what `tucker2` finds. One pass is all there is to see.

    Source: LoRA-SB, arXiv 2411.19557.
    """

    def __init__(self, shape: tuple[int, int], rank: tuple[int, int], learning_rate: float) -> None:
        (o, i), self.rank = shape, rank
        self.learning_rate = learning_rate
        self.U, self.V = (
            torch.zeros(o, 0, dtype=torch.float32),
            torch.eye(i, dtype=torch.float32),
        )  # products with these are the gradients themselves
        self._factors: tuple[Tensor, Tensor] | None = None

    def turn(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Take the gradients `(o, i)` of the sites, which the products with `V = I` are."""
        self._steps = [-self.learning_rate * G.sign() for G in left]
        (k, r), (o, i) = self.rank, (len(self.U), len(self.V))
        self._factors = tucker2([(M, self.V) for M in self._steps], torch.eye(o, k), torch.eye(i, r), 10)

    def factors(self) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
        """Return `U` and `V`, orthonormal."""
        assert self._factors is not None
        return self._factors

    def cores(self) -> Tensor:  # (sites, k, r)
        """Return the steps between the factors, `Uᵀ M_s V`."""
        U, V = self.factors()
        return torch.stack([U.T @ M @ V for M in self._steps])


def tucker2(
    updates: Sequence[tuple[Tensor, Tensor]],  # (o, q), (q, i)
    U: Tensor,  # (o, k)
    V: Tensor,  # (i, r)
    rounds: int = 100,
) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
    """Return the `U` and `V` that maximise `Σ_s ‖Uᵀ B_s A_s V‖²`: HOSVD, then HOOI until it gains nothing.

    Args:
        updates: `B_s` and `A_s` of every site; `q` may differ. Their products are never built.
        U: Columns that take the place of directions which the updates leave open.
        V: The same on the input side.
        rounds: Most rounds of HOOI.

    Returns:
        Orthonormal factors in the types of `U` and `V`, columns by falling energy.

    Example:
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> U, V = tucker2([(B, A)], torch.eye(6, 2), torch.eye(5, 2))
        >>> torch.allclose(U @ U.T @ B @ A @ V @ V.T, B @ A, atol=1e-5)
        True
    """
    types = U.dtype, V.dtype
    pairs = [(B.double(), A.double()) for B, A in updates]
    # the other side of B A is orthonormal but for its triangle, so these have the left singular vectors of the stacks
    U = leading(torch.cat([B @ triangle(A.T) for B, A in pairs], 1), U.double())
    V = leading(torch.cat([A.T @ triangle(B) for B, A in pairs], 1), V.double())
    energy = 0.0
    for _ in range(rounds):
        U = leading(torch.cat([B @ (A @ V) for B, A in pairs], 1), U)
        products = torch.cat([A.T @ (B.T @ U) for B, A in pairs], 1)
        V = leading(products, V)
        before, energy = energy, float((V.T @ products).square().sum())
        if energy <= before * (1 + 1e-12):
            break
    return U.to(types[0]), V.to(types[1])


def leading(
    stacked: Tensor,  # (n, m)
    before: Tensor,  # (n, q)
) -> Tensor:  # (n, q)
    """Return the leading `q` left singular vectors; columns of `before` take the place of those that are not there."""
    return signed(completed(principal(stacked.double())[0], before.double())).to(before)


def completed(
    vectors: Tensor,  # (n, m), orthonormal
    others: Tensor,  # (n, q)
) -> Tensor:  # (n, q)
    """Return the first `q` of some vectors; where there are fewer, what `others` add to their span follows."""
    q = others.shape[1]
    if vectors.shape[1] >= q:
        return vectors[:, :q]
    more = torch.linalg.qr(torch.cat([vectors, others], 1)).Q[:, vectors.shape[1] : q]
    return torch.cat([vectors, more], 1)


def principal(columns: Tensor) -> tuple[Tensor, Tensor]:  # (n, m) -> (n, q), (q,)
    """Return left singular vectors and squared singular values, falling, without those that are rounding."""
    if columns.shape[0] <= columns.shape[1]:
        return of_gram(columns @ columns.T)
    Q, R = torch.linalg.qr(columns)
    vectors, energies = of_gram(R @ R.T)
    alive = len(energies)
    for rows in Q.split(128):  # in place: `Q` may be as large as all that is known of the matrices
        rows[:, :alive] = rows @ vectors
    return Q[:, :alive], energies


def of_gram(S: Tensor) -> tuple[Tensor, Tensor]:  # (n, n) -> (n, q), (q,)
    """Return eigenvectors and eigenvalues of `S = M Mᵀ`, falling, without those that are rounding."""
    energies, vectors = torch.linalg.eigh(S)
    energies, vectors = energies.flip(0), vectors.flip(1)
    alive = int((energies > ROUNDING * energies[:1].clamp_min(0)).sum())
    return vectors[:, :alive], energies[:alive]


def signed(vectors: Tensor) -> Tensor:
    """Return columns of which the largest entry is positive: the library leaves the signs open."""
    if not vectors.shape[1]:
        return vectors
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def triangle(M: Tensor) -> Tensor:  # (*n, d, q) -> (*n, q, min(d, q))
    """Return `Rᵀ` of `M = Q R`: what `M` scales and mixes, without the rotation that no energy depends on."""
    return torch.linalg.qr(M, mode="r").R.mT
