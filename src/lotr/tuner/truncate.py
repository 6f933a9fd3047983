"""Smaller ranks for a trained adapter: Tucker-2 of its update, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, near
from ..math.update import one_by_one
from ..sharing.allocation import Rank
from ..sharing.plan import Group, Plan
from .adapted import Adapted, Member
from .checks import checked_rank, pair
from .config import LotrConfig
from .group import LotrGroup, LotrLayer
from .ranks import Numbers, members_of, set_ranks, tied


@dataclass(frozen=True)
class Truncated:
    """What became of one group: its ranks `(k, r)` before and after, and the share of `Σ ‖ΔW‖²` that is left."""

    group: str
    before: tuple[int, int]
    after: tuple[int, int]
    kept: float


@torch.no_grad()
def truncate(
    model: nn.Module,
    rank: int | tuple[int, int] | None = None,
    energy: float | None = None,
    adapter: str | None = None,
) -> list[Truncated]:
    """Cut the ranks of a trained adapter down, keeping as much of its update as the ranks allow.

    Every group's updates `U C_s Vᵀ` are turned to the directions that carry most of `Σ_s ‖ΔW_s‖²`; afterwards `U` and
    `V` are orthonormal. Make an optimiser anew when training goes on.

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

    Source: higher-order SVD (De Lathauwer et al., 2000).

    Example:
        >>> from peft import get_peft_model
        >>> from lotr import LotrConfig
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = get_peft_model(base, LotrConfig(r=4, target_modules=["0", "1"], init_weights=False))
        >>> [group.after for group in truncate(model, rank=2)]
        [(2, 2)]
    """
    asked = _asked(rank, energy)
    name, config = _named(model, adapter)
    _check(config)
    members = members_of(model, name)
    spectra = {group: _Spectrum(group, name, found) for group, found in members.items()}
    ranks = {
        spectrum.group.name: spectrum.ranks(energy) if asked is None else _least(spectrum.group.rank, asked)
        for spectrum in spectra.values()
    }
    ranks = _equal_where_tied(config.recorded_plan(), ranks)
    set_ranks(config, members, ranks, lambda group, rank: spectra[group].cut(*rank))
    config.basis = config.basis_hash = None  # a copy of a basis has factors of its own from here on
    return [
        Truncated(s.group.name, s.group.rank, ranks[s.group.name], s.kept(*ranks[s.group.name]))
        for s in spectra.values()
    ]


class _Spectrum:
    """The update of one group between orthonormal bases, and how its energy falls along both sides."""

    def __init__(self, group: LotrGroup, adapter: str, members: list[tuple[Adapted, Member]]) -> None:
        self.group: Group = members[0][1].part.group
        updates = [adapted.placed(member).update for adapted, member in members]
        # in double precision: what is cut is small beside what stays
        self.Q_U, R_U = torch.linalg.qr(group.lotr_U[adapter].weight.double())
        self.Q_V, R_V = torch.linalg.qr(group.lotr_V[adapter].weight.T.double())
        home = R_U.device
        self.cores = [
            R_U @ one_by_one(u.C.double().to(home), u.grid) @ R_V.T for u in updates
        ]  # (sites, k, r)
        stacked = torch.cat(self.cores)
        self.left, self.sigma_U, _ = torch.linalg.svd(stacked.movedim(1, 0).flatten(1), full_matrices=False)
        self.right, self.sigma_V, _ = torch.linalg.svd(stacked.movedim(2, 0).flatten(1), full_matrices=False)

    def ranks(self, energy: float | None) -> Rank:
        """Return the smallest ranks of which each keeps a share of the energy."""
        assert energy is not None
        k, r = (self._enough(sigma, energy) for sigma in (self.sigma_U, self.sigma_V))
        return k, r

    def _enough(self, sigma: Tensor, energy: float) -> int:
        share = sigma.square().cumsum(0) / sigma.square().sum().clamp_min(1e-300)
        return min(len(sigma), int((share < energy - 1e-12).sum()) + 1)

    def cut(self, k: int, r: int) -> Numbers:
        """Return `U` `(o, k)`, the cores `(sites, k, r)` of each part, and `V` `(i, r)`."""
        P, Q = self.left[:, :k], self.right[:, :r]
        return self.Q_U @ P, [P.T @ cores @ Q for cores in self.cores], self.Q_V @ Q

    def kept(self, k: int, r: int) -> float:
        """Return the share of the energy that ranks leave."""
        whole = sum(float(cores.square().sum()) for cores in self.cores)
        left = sum(float(cores.square().sum()) for cores in self.cut(k, r)[1])
        return left / whole if whole > 0 else 1.0


def _asked(rank: Any, energy: Any) -> Rank | None:
    """Return the ranks that were asked for, or nothing where an energy was."""
    if (rank is None) == (energy is None):
        raise ConfigError(f"rank={rank} and energy={energy}: give one of the two.")
    if rank is not None:
        return pair(checked_rank("rank", rank))
    if not isinstance(energy, Real) or isinstance(energy, bool) or not 0 < float(energy) <= 1:
        raise ConfigError(f"energy={energy!r} is not a share. Use a number above 0 and at most 1.")
    return None


def _named(model: nn.Module, adapter: str | None) -> tuple[str, LotrConfig]:
    """Return the name of the adapter to cut down, and its configuration in the model."""
    configs = getattr(model, "peft_config", {})
    layers = [module for module in model.modules() if isinstance(module, LotrLayer)]
    if not configs or not layers:
        raise ConfigError(
            f"The model ({type(model).__name__}) has no adapter of this library to cut down. Give the PEFT model: what "
            "get_peft_model(model, LotrConfig()) or PeftModel.from_pretrained returned."
        )
    names = {name for layer in layers for name in layer.active_adapters} if adapter is None else {adapter}
    if adapter is not None and adapter not in configs:
        raise ConfigError(f"Adapter {adapter!r} does not exist. {near(adapter, configs)}")
    if len(names) != 1:
        raise ConfigError(
            f"Adapters {sorted(names)} are active, and one is cut down at a time. Name one of {sorted(configs)} as "
            "adapter."
        )
    (name,) = names
    return name, configs[name]


def _check(config: Any) -> None:
    """Refuse an adapter that has no cut."""
    if not isinstance(config, LotrConfig) or config.core != "free":
        core = getattr(config, "core", None)
        raise ConfigError(
            f"Only free cores can be cut down group by group, and the adapter has core={core!r}. Train it with a "
            "smaller rank."
        )
    if config.refers_to_basis:
        raise ConfigError(
            f"Cutting ranks down turns the factors, and here they are those of basis={config.basis!r}, to which the "
            "cores refer, so they stay. Make the adapter with basis_copy=True; then its file holds factors of its own."
        )


def _least(have: Rank, asked: Rank) -> Rank:
    return min(have[0], asked[0]), min(have[1], asked[1])


def _equal_where_tied(plan: Plan, ranks: dict[str, Rank]) -> dict[str, Rank]:
    """Return ranks of which all groups that meet in modules have the largest."""
    equal: dict[str, Rank] = {}
    for names in tied(plan):
        k, r = (max(ranks[name][side] for name in names) for side in (0, 1))
        equal |= dict.fromkeys(names, (k, r))
    return equal
