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

from .moments import SecondMoment, completed

#: Weighted updates of some tasks: group → of each of its sites `B` `(n, o, q)` and `A` `(n, q, i)`.
Batch = Mapping[str, list[tuple[Tensor, Tensor]]]
Batches = Callable[[], Iterator[Batch]]
Shape = tuple[int, int]


@dataclass
class GroupFit:
    """What is known of one group between two passes.

    Args:
        shape: Block `(o, i)`.
        energy: `Σ w² ‖Δ‖²` over its tasks and sites.
        Q_U: Directions in which the updates have energy at all, output side, by falling energy, shape `(o, K)`.
        Q_V: The same on the input side.
        kept: Energy that the HOSVD keeps at rank `n + 1`, for every rank.
        U: Output factor in the coordinates of `Q_U`; set by `begin`.
        V: Input factor in the coordinates of `Q_V`.
        errors: Relative error `√(1 − kept)` at the start and after every sweep.
    """

    shape: Shape
    energy: float
    Q_U: Tensor
    Q_V: Tensor
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    U: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    V: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    errors: list[float] = field(default_factory=list)

    def begin(self, rank: int) -> None:
        """Start at the HOSVD of a rank."""
        self.U, self.V = (torch.eye(Q.shape[1], min(rank, Q.shape[1])).double() for Q in (self.Q_U, self.Q_V))
        kept = float(self.kept[min(rank, len(self.kept)) - 1]) if len(self.kept) else 0.0
        self.errors = [self.error(kept)]

    def error(self, kept: float) -> float:
        """Return the relative error that leaves this energy."""
        return max(1 - kept / self.energy, 0.0) ** 0.5 if self.energy else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:  # (o, rank), (i, rank)
        """Return `U` and `V`, orthonormal; directions that no update has fill up what is missing."""
        return completed(self.Q_U @ self.U, rank), completed(self.Q_V @ self.V, rank)


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
                P = B @ _triangle(A.mT)
                left[name].add(P)
                right[name].add(A.mT @ _triangle(B))
                energy[name] += float(P.square().sum())
    fits = {
        name: GroupFit(shape, energy[name], left[name].leading(widest)[0], right[name].leading(widest)[0])
        for name, shape in groups.items()
    }
    squares = {name: torch.zeros(f.Q_U.shape[1], f.Q_V.shape[1]).double() for name, f in fits.items()}
    for batch in batches():
        for name, of_group in fits.items():
            for B, A in _reduced(batch[name], of_group):
                for B_t, A_t in zip(B, A, strict=True):  # one at a time: the product is as large as the block
                    squares[name] += (B_t @ A_t).square_()
    for name, square in squares.items():
        corner = square.cumsum(0).cumsum(1)
        n = max(square.shape)
        last = (torch.arange(n).clamp_max(size - 1) for size in square.shape)
        fits[name].kept = corner[tuple(last)] if square.numel() else torch.zeros(1).double()
    return fits


def sweep(fits: Mapping[str, GroupFit], batches: Batches) -> None:
    """Run one sweep of HOOI on every group: `U` for the `V` there is, then `V` for the new `U`."""
    for side in ("U", "V"):
        moments = {
            name: SecondMoment(len(f.U if side == "U" else f.V), max(len(f.U), len(f.V)))
            for name, f in fits.items()
        }
        for batch in batches():
            for name, of_group in fits.items():
                for B, A in _reduced(batch[name], of_group):
                    if side == "U":
                        moments[name].add(B @ _triangle((A @ of_group.V).mT))
                    else:
                        moments[name].add(A.mT @ _triangle(of_group.U.T @ B))
        for name, of_group in fits.items():
            before = getattr(of_group, side)
            vectors, energies = moments[name].leading(before.shape[1])
            setattr(of_group, side, completed(vectors, before.shape[1]))
            if side == "V":
                of_group.errors.append(of_group.error(float(energies.sum())))


def is_settled(of_group: GroupFit, tolerance: float) -> bool:
    """Whether the last sweep gained less than `tolerance`, relative to the error."""
    if len(of_group.errors) < 2:
        return of_group.errors[-1] == 0.0 or of_group.U.shape[1] == len(of_group.U)
    before, after = of_group.errors[-2:]
    return before - after <= tolerance * before or after < 1e-7


def _reduced(updates: list[tuple[Tensor, Tensor]], of_group: GroupFit) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield updates in the coordinates of the directions that have energy."""
    for B, A in updates:
        yield of_group.Q_U.T @ B, A @ of_group.Q_V


def _triangle(M: Tensor) -> Tensor:  # (n, d, q) -> (n, q, min(d, q))
    """Return `Rᵀ` of `M = Q R`: what `M` scales and mixes, without the rotation that no energy depends on."""
    return torch.linalg.qr(M, mode="r").R.mT


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
    left = (beside_U @ _triangle(A.mT)).square().sum((1, 2))
    right = (beside_V.mT @ _triangle(UB)).square().sum((1, 2))
    return UB @ AV, left + right
