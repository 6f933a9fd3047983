"""Shared factors and cores for many low-rank updates at once: Tucker-2 of a stack that is never written out.

For updates `Δ_{t,s} = B_{t,s} A_{t,s}` of tasks `t` at the sites `s` of a group, orthonormal `U` and `V` maximise
`Σ_{t,s} w_t² ‖Uᵀ Δ_{t,s} V‖²`, and the best cores are `C_{t,s} = Uᵀ Δ_{t,s} V`. The error is what is left:
`‖Δ − U C Vᵀ‖² = ‖Δ‖² − ‖C‖²`. Updates come in batches of tasks, as often as they are asked for; what is kept between
passes depends on the width of the group and not on how many there are.

Source: Compress then Serve (arXiv 2407.00066); HOSVD and HOOI (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..math.hooi import completed, triangle
from ..math.moments import SecondMoment

#: Weighted updates of some tasks: group → of each of its sites `B` `(n, o, q)` and `A` `(n, q, i)`.
Batch = Mapping[str, list[tuple[Tensor, Tensor]]]
Batches = Callable[[], Iterator[Batch]]
Shape = tuple[int, int]


@dataclass
class GroupFit:
    """What is known of one group between two passes.

    Args:
        energy: `Σ w² ‖Δ‖²` over its tasks and sites.
        Q_U: Directions in which the updates have energy at all, output side, by falling energy, shape `(o, K)`.
        Q_V: The same on the input side, shape `(i, L)`.
        squares: Energy between each two of these directions, shape `(K, L)`.
        U: Output factor, in the coordinates of `Q_U` unless that is empty.
        V: Input factor, in those of `Q_V`.
        errors: Relative error at the start and after every sweep.
    """

    energy: float
    Q_U: Tensor
    Q_V: Tensor
    squares: Tensor
    U: Tensor
    V: Tensor
    errors: list[float] = field(default_factory=list)

    @property
    def kept(self) -> Tensor:
        """Energy that the HOSVD keeps at rank `n + 1`, for every rank."""
        corner = self.squares.cumsum(0).cumsum(1)
        n = torch.arange(max(self.squares.shape) if self.squares.numel() else 0)
        K, L = self.squares.shape
        return corner[n.clamp_max(K - 1), n.clamp_max(L - 1)]

    def error(self, kept: float) -> float:
        """Return the relative error that leaves this energy."""
        return max(1 - kept / self.energy, 0.0) ** 0.5 if self.energy else 0.0

    def turn_back(self) -> None:
        """Leave the coordinates of the directions on a side where they are hardly fewer than those of the block."""
        for side, factor in (("Q_U", "U"), ("Q_V", "V")):
            Q = getattr(self, side)
            if 2 * Q.shape[1] > Q.shape[0] > 0:
                setattr(self, factor, Q @ getattr(self, factor))
                setattr(self, side, Q.new_zeros(0, 0))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:  # (o, rank), (i, rank)
        """Return `U` and `V`; directions that no update has fill up what is missing."""
        U = self.Q_U @ self.U if len(self.Q_U) else self.U
        V = self.Q_V @ self.V if len(self.Q_V) else self.V
        open_U, open_V = (torch.eye(len(factor), rank).double() for factor in (U, V))
        return completed(U, open_U), completed(V, open_V)

    def reduced(self, updates: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `B` `(n, K, q)` and `A` `(n, q, L)` in the coordinates of `U` and `V`."""
        for B, A in updates:
            n, _, q = B.shape
            if len(self.Q_U):  # one product of matrices, and not one a task
                B = (self.Q_U.T @ B.movedim(1, 0).flatten(1)).unflatten(1, (n, q)).movedim(0, 1)
            yield B, A @ self.Q_V if len(self.Q_V) else A


def directions(groups: Mapping[str, Shape], batches: Batches, widest: int = 1024) -> dict[str, GroupFit]:
    """Return the HOSVD of every group: one pass for the directions, one for the energy that each rank keeps.

    Args:
        groups: Name → block `(o, i)`.
        batches: Yields the updates of all tasks.
        widest: Blocks at most this wide are summed exactly; of wider ones the leading directions are followed.
    """
    left = {name: SecondMoment(o, widest) for name, (o, _) in groups.items()}
    right = {name: SecondMoment(i, widest) for name, (_, i) in groups.items()}
    energy = dict.fromkeys(groups, 0.0)
    for batch in batches():
        for name in groups:
            for B, A in batch[name]:
                P = B @ triangle(A.mT)
                left[name].add(P)
                right[name].add(A.mT @ triangle(B))
                energy[name] += float(P.square().sum())
    none = torch.zeros(0, 0, dtype=torch.float64)
    fits: dict[str, GroupFit] = {}
    for name in groups:
        Q_U, Q_V = left[name].leading(widest)[0], right[name].leading(widest)[0]
        squares = torch.zeros(Q_U.shape[1], Q_V.shape[1], dtype=torch.float64)
        fits[name] = GroupFit(energy[name], Q_U, Q_V, squares, none, none)
    for batch in batches():
        for name, of_group in fits.items():
            for B, A in of_group.reduced(batch[name]):
                for B_t, A_t in zip(B, A, strict=True):  # one at a time: the product is as large as the block
                    of_group.squares += (B_t @ A_t).square_()
    return fits


def begin(fits: Mapping[str, GroupFit], ranks: Mapping[str, int], batches: Batches) -> None:
    """Start every group at its HOSVD; no pass is needed for it."""
    for name, of_group in fits.items():
        r = ranks[name]
        of_group.U, of_group.V = (torch.eye(n, min(r, n)).double() for n in of_group.squares.shape)
        of_group.errors = [of_group.error(float(of_group.squares[:r, :r].sum()))]


def sweep(fits: Mapping[str, GroupFit], batches: Batches) -> None:
    """Run one sweep of HOOI on every group: `U` for the `V` there is, then `V` for the new `U`."""
    for side in ("U", "V"):
        moments = {
            name: SecondMoment(len(f.U if side == "U" else f.V), max(len(f.U), len(f.V)))
            for name, f in fits.items()
        }
        for batch in batches():
            for name, of_group in fits.items():
                for B, A in of_group.reduced(batch[name]):
                    if side == "U":
                        moments[name].add(B @ triangle((A @ of_group.V).mT))
                    else:
                        moments[name].add(A.mT @ triangle(of_group.U.T @ B))
        for name, of_group in fits.items():
            before = getattr(of_group, side)
            vectors, energies = moments[name].leading(before.shape[1])
            setattr(of_group, side, completed(vectors, before))
            if side == "V":
                of_group.errors.append(of_group.error(float(energies.sum())))


def is_settled(of_group: GroupFit, tolerance: float) -> bool:
    """Whether the last sweep gained less than `tolerance`, relative to the error."""
    before, after = [1.0, *of_group.errors][-2:]
    return after < 1e-7 or (len(of_group.errors) > 1 and before - after <= tolerance * before)


def project(
    B: Tensor,  # (n, o, q)
    A: Tensor,  # (n, q, i)
    U: Tensor,  # (o, k)
    V: Tensor,  # (i, r)
) -> tuple[Tensor, Tensor]:  # (n, k, r), (n,)
    """Return the best cores `Uᵀ B A V` on orthonormal factors, and `‖B A − U C Vᵀ‖²` of each.

    What is left is computed from the parts of `B` and `A` beside the factors, so it is exact also where it is tiny.
    """
    UB, AV = U.T @ B, A @ V
    beside_U, beside_V = B - U @ UB, A - AV @ V.T
    left = (beside_U @ triangle(A.mT)).square().sum((1, 2))
    right = (beside_V.mT @ triangle(UB)).square().sum((1, 2))
    return UB @ AV, left + right
