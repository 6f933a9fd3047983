"""`lotr.truncate`: smaller ranks for a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..math.hooi import tucker2
from ..sharing.groups import Group, Part
from .checks import checked_rank
from .config import LotrConfig, pair
from .factors import find_adapter, parts_of, set_ranks
from .group import LotrGroup, linear_from
from .weight import AdaptedWeight

Rank = tuple[int, int]  # (k, r)


@dataclass(frozen=True)
class Truncated:
    """What became of one group: its ranks `(k, r)` before and after, and the share of `Σ ‖ΔW‖²` that is left."""

    group: str
    before: Rank
    after: Rank
    kept: float


@torch.inference_mode(False)  # in which new numbers could never train again
@torch.no_grad()
def truncate(
    model: nn.Module,
    rank: int | Rank | None = None,
    energy: float | None = None,
    adapter: str | None = None,
) -> list[Truncated]:
    """Cut the ranks of a trained adapter down, keeping as much of its update as the ranks allow.

    Every group's updates `U C_s Vᵀ` are turned to the directions that carry most of `Σ_s ‖ΔW_s‖²`; afterwards `U` and
    `V` are orthonormal. Sites that use the first rows of a factor count with what those rows carry, and their cores are
    the nearest to their updates. Make an optimiser anew when training goes on.

    Args:
        model: A PEFT model with an adapter that has free cores.
        rank: Largest rank of every group, one number or `(k, r)`.
        energy: Instead of a rank: the share of each group's energy that each side has to keep, in (0, 1].
        adapter: Name of the adapter; default: the active one.

    Returns:
        One entry a group.

    Raises:
        ConfigError: Neither or both of rank and energy are given, or they are no rank and no share; the model has no
            adapter of that name, or several active ones; its cores are not free, or its factors are those of a basis
            that it refers to.

    Source: HOSVD and HOOI (De Lathauwer et al., 2000).

    Example:
        >>> from peft import get_peft_model
        >>> from lotr import LotrConfig
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = get_peft_model(base, LotrConfig(r=4, target_modules=["0", "1"], init_weights=False))
        >>> [group.after for group in truncate(model, rank=2)]
        [(2, 2)]
    """
    name, config = find_adapter(model, adapter)
    _check(config, rank, energy)
    parts = parts_of(model, name)
    updates = {group: _Update(group, name, of_group) for group, of_group in parts.items()}
    ranks = {update.group.name: update.ranks(rank, energy or 0.0) for update in updates.values()}
    plan = set_ranks(config, ranks)
    ranks = {group.name: group.rank for group in plan.groups}  # of a module with smaller blocks, cut to those
    report = []
    for shared, update in updates.items():
        after = ranks[update.group.name]
        U, cores, V, energy = update.cut(*after)
        _replace(shared, name, parts[shared], U, cores, V)
        kept = energy / update.energy if update.energy else 1.0
        report.append(Truncated(update.group.name, update.group.rank, after, kept))
    for layer in {layer for of_group in parts.values() for layer, _ in of_group}:
        own = layer.adapters[name]
        planned = {part.name: part for part in plan.parts[own.parts[0][0].sites[0].module]}
        layer.adapters[name] = replace(own, parts=tuple((planned[p.name], group) for p, group in own.parts))
    config.basis = config.basis_hash = None  # a copy of a basis has factors of its own from here on
    return report


class _Update:
    """The updates of one group, as cores between orthonormal bases; in double, because what is cut is small.

    A narrower site sees the first rows of a basis alone. Between square roots of their Gram matrices its core has the
    norm of its update, so that all sites weigh as much as they change their weights.
    """

    def __init__(self, shared: LotrGroup, adapter: str, parts: list[tuple[AdaptedWeight, Part]]) -> None:
        self.group: Group = parts[0][1].group
        self.Q_U, R_U = torch.linalg.qr(shared.lotr_U[adapter].weight.double())
        self.Q_V, R_V = torch.linalg.qr(shared.lotr_V[adapter].weight.T.double())
        cores = [part.cores(layer.site_core(adapter, part).to(R_U)) for layer, part in parts]
        blocks = [part.block[::-1] if part.transposed else part.block for _, part in parts]
        self.roots = [(_root(self.Q_U, n), _root(self.Q_V, m)) for n, m in blocks]
        #: Of each part, `(sites, k, r)`.
        self.cores = [A @ R_U @ C @ R_V.T @ B for C, (A, B) in zip(cores, self.roots, strict=True)]
        self.energy = sum(float(C.square().sum()) for C in self.cores)

    def ranks(self, most: int | Rank | None, energy: float) -> Rank:
        """Return the ranks that are asked for, or the smallest of which each keeps a share of the energy."""
        if most is not None:
            (k, r), (most_k, most_r) = self.group.rank, pair(most)
            return min(k, most_k), min(r, most_r)
        stacked = torch.cat(self.cores)
        k, r = (_enough(torch.linalg.svdvals(stacked.movedim(side, 0).flatten(1)), energy) for side in (1, 2))
        return k, r

    def cut(self, k: int, r: int) -> tuple[Tensor, list[Tensor], Tensor, float]:
        """Return `U` `(o, k)`, the cores `(sites, k, r)` of each part, `V` `(i, r)`, and the energy that is left."""
        eye_U, eye_V = (torch.eye(n).to(self.Q_U) for n in self.group.rank)
        P, Q = tucker2([(C, eye_V) for C in torch.cat(self.cores)], eye_U[:, :k], eye_V[:, :r])
        cores, energy = [], 0.0
        for C, (A, B) in zip(self.cores, self.roots, strict=True):
            left, right = A @ P, B @ Q  # the new factors as the sites see them; least squares between them
            cores.append(torch.linalg.pinv(left) @ C @ torch.linalg.pinv(right).T)
            energy += float((left @ cores[-1] @ right.T).square().sum())
        return self.Q_U @ P, cores, self.Q_V @ Q, energy


def _root(basis: Tensor, n: int) -> Tensor:  # (N, q) -> (q, q)
    """Return the root of `N/n · BᵀB` of the first `n` rows `B` of a basis; the identity where those are all."""
    if n == len(basis):
        return torch.eye(basis.shape[1]).to(basis)
    values, vectors = torch.linalg.eigh(basis[:n].T @ basis[:n] * (len(basis) / n))
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _enough(sigma: Tensor, energy: float) -> int:
    """Return how many of the falling singular values carry a share of the energy."""
    share = sigma.square().cumsum(0) / sigma.square().sum().clamp_min(1e-300)
    return min(len(sigma), int((share < energy - 1e-12).sum()) + 1)


def _replace(
    shared: LotrGroup,
    adapter: str,
    parts: list[tuple[AdaptedWeight, Part]],
    U: Tensor,
    cores: list[Tensor],
    V: Tensor,
) -> None:
    """Put factors and cores of other shapes in the place of those of a group."""
    for factors, weight in ((shared.lotr_U, U), (shared.lotr_V, V.T)):
        before = factors[adapter].weight
        factors[adapter] = linear_from(weight.to(before))
        factors[adapter].weight.requires_grad_(before.requires_grad)
    for (layer, part), of_part in zip(parts, cores, strict=True):
        before = layer.site_core(adapter, part)
        C = nn.Parameter(part.lay(of_part).to(before).contiguous(), before.requires_grad)
        layer.lotr_C[adapter].register_parameter(part.name, C)


def _check(config: LotrConfig, rank: Any, energy: Any) -> None:
    """Refuse anything but one rank or one share, and an adapter that has no cut."""
    if (rank is None) == (energy is None):
        raise ConfigError(f"rank={rank} and energy={energy}: give one of the two.")
    if rank is not None:
        checked_rank("rank", rank)
    elif not isinstance(energy, Real) or isinstance(energy, bool) or not 0 < float(energy) <= 1:
        raise ConfigError(f"energy={energy!r} is not a share. Use a number above 0 and at most 1.")
    if config.core != "free":
        raise ConfigError(
            f"Only free cores can be cut down group by group, and the adapter has core={config.core!r}. Train it with "
            "a smaller rank."
        )
    if config.refers_to_basis:
        raise ConfigError(
            f"Cutting ranks down turns the factors, and here they are those of basis={config.basis!r}, to which the "
            "cores refer, so they stay. Make the adapter with basis_copy=True; then its file holds factors of its own."
        )
