"""The subspaces in which the weights, gradients or activations of a group's sites lie: Tucker-2 without the stack.

For matrices `M_s` of shape `(o, i)`, one a site, `U` and `V` maximise `Σ_s w_s² ‖Uᵀ M_s V‖²`. Only products `M_s V`
and `M_sᵀ U` are ever needed, so a matrix may be a sum over batches that nobody has built: the first round multiplies by
random columns (a sketch, which gives the higher-order SVD), every further round is one of HOOI.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .init import orthonormal

_MORE = 8  # columns beyond the rank: they make the first, random round as good as the exact one


class Subspaces:
    """Factors of one group that turn towards the matrices of its sites.

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
        for_U, for_V = self._weights
        self.U = _leading(left, for_U, self.U)
        self.V = _leading(right, for_V, self.V)

    def _weigh(self, products: Sequence[Tensor]) -> Tensor:  # (sites,)
        norms = torch.stack([P.norm() for P in products])
        alive = norms > 1e-6 * norms.max()
        weights = 1 / norms.where(alive, torch.ones_like(norms)) if self.normalise else torch.ones_like(norms)
        return weights * alive

    def factors(self) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
        """Return `U` and `V`, orthonormal."""
        return self.U[:, : self.k].contiguous(), self.V[:, : self.r].contiguous()


def _leading(products: Sequence[Tensor], weights: Tensor, before: Tensor) -> Tensor:  # (n, q)
    """Return the leading left singular vectors of weighed matrices side by side; `before` where all are zero."""
    if not weights.any():
        return before
    stacked = torch.cat([w * P for w, P in zip(weights, products, strict=True)], dim=1).double()
    if stacked.shape[0] <= stacked.shape[1]:
        vectors = torch.linalg.eigh(stacked @ stacked.T).eigenvectors.flip(1)
    else:
        vectors = torch.linalg.svd(stacked, full_matrices=False).U
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # the library leaves them open
    return (vectors * signs)[:, : before.shape[1]].to(before)
