"""Diagonal cores: `Δ_{t,s} ≈ U diag(c_{t,s}) Vᵀ`, by alternating least squares on the same thin products.

Source: Compress then Serve (arXiv 2407.00066), there "JD-Diag"; CP by alternating least squares (Kolda & Bader, 2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .fit import Batch, GroupFit, Shape, Sums, Total, reduced


def kept_at_least(of_group: GroupFit) -> Tensor:  # (n,)
    """Return the energy that diagonals keep without any sweep, for every rank.

    That is what the best pairs of HOSVD directions have between them, or the strongest directions of single updates.
    """
    n = len(of_group.own_energies)
    shared = of_group.squares.flatten().sort(descending=True).values[:n].cumsum(0)
    return torch.maximum(shared, of_group.own_energies.cumsum(0)[: len(shared)])


def begin(fits: Mapping[str, GroupFit], ranks: Mapping[str, Shape], total: Total) -> None:
    """Start every group at the best of three pairs of factors.

    One takes the pairs of HOSVD directions between which there is most energy. The next is exact where the updates
    do have diagonal cores: for two sums of updates `S = U D Vᵀ` and `S' = U D' Vᵀ`, the eigenvectors of `S S'⁻¹`
    are `U`. The last takes the strongest singular directions of single updates, so that diagonals are no worse than
    adapters that are cut one by one to the same number of directions.
    """
    sums = total(partial(_mixtures, fits, ranks))
    starts = {}
    for name, f in fits.items():
        r = min(ranks[name])
        starts[name] = _pairs(f, r), _eigenvectors(f, r, *sums[name]), (f.own_U[:, :r], f.own_V[:, :r])
    for name, kept in total(partial(_kept, fits, starts)).items():
        best = max(range(3), key=kept.__getitem__)
        fits[name].U, fits[name].V = starts[name][best]
        fits[name].errors = [fits[name].error(kept[best])]


def _mixtures(fits: Mapping[str, GroupFit], ranks: Mapping[str, Shape], batches: Iterable[Batch]) -> Sums:
    """Return two sums of updates between the leading directions, each weighted by its part along a drawn direction."""
    generator = torch.Generator().manual_seed(0)
    sums, drawn = {}, {}
    for name, of_group in fits.items():
        shape = [min(rank, n) for rank, n in zip(ranks[name], of_group.squares.shape, strict=True)]
        sums[name] = [torch.zeros(*shape).double() for _ in range(2)]
        drawn[name] = [torch.randn(2, n, generator=generator).double() for n in shape]
    for name, _, B, A in reduced(fits, batches):
        u, v = drawn[name]
        B, A = B[:, : u.shape[1]], A[:, :, : v.shape[1]]
        for n in range(2):
            weights = ((u[n] @ B) * (A @ v[n])).sum(-1)
            sums[name][n] += torch.einsum("n,nkq,nqr->kr", weights, B, A)
    return sums


def _kept(fits: Mapping[str, GroupFit], starts: Mapping[str, Any], batches: Iterable[Batch]) -> Sums:
    """Return the energy that pairs of factors keep."""
    sums = {name: [0.0 for _ in of_group] for name, of_group in starts.items()}
    for name, _, B, A in reduced(fits, batches):
        for n, (U, V) in enumerate(starts[name]):
            sums[name][n] += float((diagonals(U, V, B, A) * _products(U, V, B, A)).sum())
    return sums


def _pairs(of_group: GroupFit, rank: int) -> tuple[Tensor, Tensor]:
    order = of_group.squares.flatten().argsort(descending=True, stable=True)[:rank]
    K, L = of_group.squares.shape
    return torch.eye(K).double()[:, order // max(L, 1)], torch.eye(L).double()[:, order % max(L, 1)]


def _eigenvectors(of_group: GroupFit, rank: int, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors that make two sums of updates diagonal; of a complex pair, its real and imaginary parts."""
    U, V = _pairs(of_group, rank)
    n = min(one.shape)
    if n:
        values, vectors = torch.linalg.eig(one[:n, :n] @ torch.linalg.pinv(other[:n, :n]))
        own = torch.where(values.imag < 0, vectors.imag, vectors.real)
        U[:, :n], V[:, :n] = 0, 0
        U[:n, :n], V[:n, :n] = own, (torch.linalg.pinv(own) @ other[:n, :n]).T
    return _unit(U), _unit(V)


def _unit(factor: Tensor) -> Tensor:
    return factor / factor.norm(dim=0).clamp_min(1e-300)


def sweep(fits: Mapping[str, GroupFit], total: Total) -> None:
    """Run one sweep: `U` for `V` and the diagonals that fit both, then `V`."""
    for side, other in (("U", "V"), ("V", "U")):
        for name, (mixed, gram, kept) in total(partial(_normal_equations, fits, side)).items():
            of_group = fits[name]
            fixed = getattr(of_group, other)
            solved = mixed @ torch.linalg.pinv(gram * (fixed.T @ fixed), hermitian=True)
            setattr(of_group, side, _unit(solved))
            if side == "U":  # of the factors before this sweep
                of_group.errors.pop()
            of_group.errors.append(of_group.error(kept))


def _normal_equations(fits: Mapping[str, GroupFit], side: str, batches: Iterable[Batch]) -> Sums:
    """Return what least squares for one side needs, and the energy that the factors keep."""
    sums: dict[str, list[Any]] = {}
    for name, f in fits.items():
        r = f.U.shape[1]
        sums[name] = [torch.zeros_like(getattr(f, side)), f.U.new_zeros(r, r), 0.0]
    for name, f, B, A in reduced(fits, batches):
        c = diagonals(f.U, f.V, B, A)
        mixed = B @ (A @ f.V) if side == "U" else A.mT @ (f.U.T @ B).mT
        sums[name][0] += (mixed * c[:, None, :]).sum(0)
        sums[name][1] += c.T @ c
        sums[name][2] += float((c * _products(f.U, f.V, B, A)).sum())
    return sums


def diagonals(
    U: Tensor,  # (o, r)
    V: Tensor,  # (i, r)
    B: Tensor,  # (n, o, q)
    A: Tensor,  # (n, q, i)
) -> Tensor:  # (n, r)
    """Return the diagonals that fit updates best: `(UᵀU ∘ VᵀV)⁻¹ diag(Uᵀ B A V)`."""
    return _products(U, V, B, A) @ torch.linalg.pinv((U.T @ U) * (V.T @ V), hermitian=True)


def _products(U: Tensor, V: Tensor, B: Tensor, A: Tensor) -> Tensor:  # (n, r)
    return ((U.T @ B) * (A @ V).mT).sum(-1)
