"""Diagonal cores: `Δ_{t,s} ≈ U diag(c_{t,s}) Vᵀ`, by alternating least squares on the same thin products.

Source: Compress then Serve (arXiv 2407.00066), there "JD-Diag"; CP by alternating least squares (Kolda & Bader, 2009).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .fit import Batches, GroupFit


def sorted_kept(of_group: GroupFit) -> Tensor:  # (K·L,)
    """Return the energy that the best `n + 1` pairs of HOSVD directions keep, for every rank."""
    return of_group.squares.flatten().sort(descending=True).values.cumsum(0)


def begin(fits: Mapping[str, GroupFit], ranks: Mapping[str, int], batches: Batches) -> None:
    """Start every group at the better of two pairs of factors.

    One takes the pairs of HOSVD directions between which there is most energy. The other is exact where the updates
    do have diagonal cores: for two sums of updates `S = U D Vᵀ` and `S' = U D' Vᵀ`, the eigenvectors of `S S'⁻¹`
    are `U`.
    """
    if not fits:
        return
    sums = {
        name: torch.zeros(2, *(min(ranks[name], n) for n in f.squares.shape)).double()
        for name, f in fits.items()
    }
    generator = torch.Generator().manual_seed(0)
    for batch in batches():
        for name, of_group in fits.items():
            k, r = sums[name].shape[1:]
            for B, A in of_group.reduced(batch[name]):
                mix = torch.randn(2, len(B), generator=generator, dtype=torch.float64)
                sums[name] += torch.einsum("sn,nkq,nqr->skr", mix, B[:, :k], A[:, :, :r])
    starts = {
        name: (_pairs(f, ranks[name]), _eigenvectors(f, ranks[name], *sums[name])) for name, f in fits.items()
    }
    kept = {name: [0.0, 0.0] for name in fits}
    for batch in batches():
        for name, of_group in fits.items():
            for B, A in of_group.reduced(batch[name]):
                for n, (U, V) in enumerate(starts[name]):
                    kept[name][n] += float((diagonals(U, V, B, A) * _products(U, V, B, A)).sum())
    for name, of_group in fits.items():
        best = max((0, 1), key=kept[name].__getitem__)
        of_group.U, of_group.V = starts[name][best]
        of_group.errors = [of_group.error(kept[name][best])]


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


def sweep(fits: Mapping[str, GroupFit], batches: Batches) -> None:
    """Run one sweep: `U` for `V` and the diagonals that fit both, then `V`."""
    for side in ("U", "V"):
        sums = {
            name: (torch.zeros_like(getattr(f, side)), f.U.new_zeros(f.U.shape[1], f.U.shape[1]))
            for name, f in fits.items()
        }
        kept = dict.fromkeys(fits, 0.0)
        for batch in batches():
            for name, of_group in fits.items():
                total, gram = sums[name]
                for B, A in of_group.reduced(batch[name]):
                    UB, AV = of_group.U.T @ B, A @ of_group.V
                    c = diagonals(of_group.U, of_group.V, B, A)
                    kept[name] += float((c * _products(of_group.U, of_group.V, B, A)).sum())
                    gram += c.T @ c
                    mixed = (B @ AV if side == "U" else A.mT @ UB.mT) * c[:, None, :]
                    total += mixed.sum(0)
        for name, of_group in fits.items():
            total, gram = sums[name]
            other = of_group.V if side == "U" else of_group.U
            solved = total @ torch.linalg.pinv(gram * (other.T @ other), hermitian=True)
            setattr(of_group, side, _unit(solved))
            if side == "U":  # of the factors before this sweep
                of_group.errors[-1] = of_group.error(kept[name])
            else:  # before the last half of it; the next sweep, or the cores, tell the rest
                of_group.errors.append(of_group.error(kept[name]))


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
