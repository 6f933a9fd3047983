"""Shared factors and cores for many low-rank updates at once: Tucker-2 of a stack that is never written out.

For updates `Δ_{t,s} = B_{t,s} A_{t,s}` of tasks `t` at the sites `s` of a group, orthonormal `U` and `V` maximise
`Σ_{t,s} w_t² ‖Uᵀ Δ_{t,s} V‖²`, and the best cores are `C_{t,s} = Uᵀ Δ_{t,s} V`. The error is what is left:
`‖Δ − U C Vᵀ‖² = ‖Δ‖² − ‖C‖²`. A pass is a function that adds up what batches of tasks contribute, here or on many
machines (`Total`); what is kept between passes depends on the width of the group and not on how many there are.

Source: Compress then Serve (arXiv 2407.00066); HOSVD and HOOI (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..math.hooi import completed, signed, triangle
from ..math.moments import SecondMoment, Strongest

#: Weighted updates of some tasks: group → of each of its sites `B` `(n, o, q)` and `A` `(n, q, i)`.
Batch = Mapping[str, list[tuple[Tensor, Tensor]]]
#: By group: numbers, tensors and moments that add up over batches.
Sums = Mapping[str, list[Any]]
#: Runs a pass, which adds up batches, over the updates of all tasks.
Total = Callable[[Callable[[Iterable[Batch]], Sums]], Sums]
Shape = tuple[int, int]
WIDEST = 1024  # blocks up to which second moments are summed exactly


@dataclass
class GroupFit:
    """What is known of one group between two passes."""

    energy: float  # `Σ w² ‖Δ‖²` over its tasks and sites
    Q_U: Tensor  # (o, K), directions in which the updates have energy at all, output side, by falling energy
    Q_V: Tensor  # (i, L), on the input side
    squares: Tensor  # (K, L), energy between each two of these directions
    U: Tensor  # output factor, in the coordinates of `Q_U` unless that is empty
    V: Tensor  # input factor, in those of `Q_V`
    errors: list[float] = field(default_factory=list)  # relative, at the start and after every sweep
    # the strongest directions of single updates, and their energies, falling
    own_U: Tensor = field(default_factory=partial(torch.zeros, 0, 0))
    own_V: Tensor = field(default_factory=partial(torch.zeros, 0, 0))
    own_energies: Tensor = field(default_factory=partial(torch.zeros, 0))

    @property
    def kept(self) -> Tensor:  # (K, L)
        """Energy that the HOSVD keeps at ranks `(k + 1, r + 1)`."""
        return self.squares.cumsum(0).cumsum(1)

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

    def factors(self, ranks: Shape) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
        """Return `U` and `V`; directions that no update has fill up what is missing."""
        U = self.Q_U @ self.U if len(self.Q_U) else self.U
        V = self.Q_V @ self.V if len(self.Q_V) else self.V
        open_U, open_V = (torch.eye(len(f), n).double() for f, n in zip((U, V), ranks, strict=True))
        # the signs that nothing decides are those of no cluster and of no library
        return signed(completed(U, open_U)), signed(completed(V, open_V))


def reduced(
    fits: Mapping[str, GroupFit], batches: Iterable[Batch]
) -> Iterator[tuple[str, GroupFit, Tensor, Tensor]]:
    """Yield groups with `B` `(n, K, q)` and `A` `(n, q, L)` of their sites, in the coordinates of `U` and `V`."""
    for batch in batches:
        for name, f in fits.items():
            for B, A in batch[name]:
                n, _, q = B.shape
                if len(f.Q_U):  # one product of matrices, and not one a task
                    B = (f.Q_U.T @ B.movedim(1, 0).flatten(1)).unflatten(1, (n, q)).movedim(0, 1)
                yield name, f, B, A @ f.Q_V if len(f.Q_V) else A


def merged(one: Sums, other: Sums) -> Sums:
    """Add the sums of other tasks to those of some."""
    for name, values in other.items():
        for n, value in enumerate(values):
            one[name][n] += value
    return one


def directions(groups: Mapping[str, Shape], total: Total, widest: int = WIDEST) -> dict[str, GroupFit]:
    """Return the HOSVD of groups with their blocks: a pass for directions, one for the energy that each rank keeps.

    The second pass collects the strongest directions of single updates too, with which diagonal cores begin. Blocks at
    most `widest` wide are summed exactly; of wider ones the leading directions are followed.
    """
    none = torch.zeros(0, 0, dtype=torch.float64)
    fits: dict[str, GroupFit] = {}
    for name, moments in total(partial(moments_of, groups, widest)).items():
        Q_U, Q_V = (moments.pop(0).leading(widest)[0] for _ in range(2))  # each is as large as the updates
        fits[name] = GroupFit(moments[0], Q_U, Q_V, none, none, none)
    for name, (squares, strongest) in total(partial(_squares, fits)).items():
        of_group = fits[name]
        of_group.squares, of_group.own_energies = squares, strongest.energies
        of_group.own_U, of_group.own_V = strongest.U, strongest.V
    return fits


def moments_of(groups: Mapping[str, Shape], widest: int, batches: Iterable[Batch]) -> Sums:
    """Return `Σ Δ Δᵀ`, `Σ Δᵀ Δ` and `Σ ‖Δ‖²`."""
    sums: dict[str, list[Any]] = {
        name: [*(SecondMoment(n, widest) for n in shape), 0.0] for name, shape in groups.items()
    }
    for batch in batches:
        for name, of_group in sums.items():
            for B, A in batch[name]:
                P = B @ triangle(A.mT)
                of_group[0].add(P)
                of_group[1].add(A.mT @ triangle(B))
                of_group[2] += float(P.square().sum())
    return sums


def _squares(fits: Mapping[str, GroupFit], batches: Iterable[Batch]) -> Sums:
    """Return the energy between each two directions, and the strongest directions of single updates."""
    sums: dict[str, list[Any]] = {}
    for name, f in fits.items():
        n, K, L = max(len(f.Q_U), len(f.Q_V)), f.Q_U.shape[1], f.Q_V.shape[1]
        sums[name] = [f.Q_U.new_zeros(K, L), Strongest(n, (K, L))]
    for name, _, B, A in reduced(fits, batches):
        sums[name][1].add(B, A)
        for B_t, A_t in zip(B, A, strict=True):  # one at a time: the product is as large as the block
            sums[name][0] += (B_t @ A_t).square_()
    return sums


def begin(fits: Mapping[str, GroupFit], ranks: Mapping[str, Shape], total: Total) -> None:
    """Start every group at its HOSVD; no pass is needed for it."""
    for name, of_group in fits.items():
        k, r = (min(rank, n) for rank, n in zip(ranks[name], of_group.squares.shape, strict=True))
        of_group.U, of_group.V = (
            torch.eye(n, m).double() for n, m in zip(of_group.squares.shape, (k, r), strict=True)
        )
        of_group.errors = [of_group.error(float(of_group.squares[:k, :r].sum()))]


def sweep(fits: Mapping[str, GroupFit], total: Total) -> None:
    """Run one sweep of HOOI on every group: `U` for the `V` there is, then `V` for the new `U`."""
    for side in ("U", "V"):
        for name, (moment,) in total(partial(_inside, fits, side)).items():
            of_group = fits[name]
            before = getattr(of_group, side)
            vectors, energies = moment.leading(before.shape[1])
            setattr(of_group, side, completed(vectors, before))
            if side == "V":
                of_group.errors.append(of_group.error(float(energies.sum())))


def _inside(fits: Mapping[str, GroupFit], side: str, batches: Iterable[Batch]) -> Sums:
    """Return the second moment of one side of what the factor of the other side keeps."""
    sums = {}
    for name, of_group in fits.items():
        widths = len(of_group.U), len(of_group.V)
        sums[name] = [SecondMoment(widths["UV".index(side)], max(widths))]
    for name, f, B, A in reduced(fits, batches):
        kept = B @ triangle((A @ f.V).mT) if side == "U" else A.mT @ triangle(f.U.T @ B)
        sums[name][0].add(kept)
    return sums


def error_of_all(fits: Collection[GroupFit]) -> float:
    """Return the relative error of all groups together."""
    energy = sum(f.energy for f in fits)
    return float((sum(f.energy * f.errors[-1] ** 2 for f in fits) / energy) ** 0.5)


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
