"""An adapter that keeps the factors of another one, its basis: what it takes over, and whether the two fit."""

from __future__ import annotations

from torch import Tensor

from ..errors import CheckpointError, ConfigError, PlanError, near
from ..math.cores import CORES
from ..sharing.keys import group_in, group_keys, is_factor
from ..sharing.plan import Plan
from .config import LotrConfig
from .saved_adapter import read_saved


def resolve_basis(config: LotrConfig) -> None:
    """Fill in what a new adapter has from the basis that its configuration names.

    Raises:
        CheckpointError: There is no such adapter, or it is of another method.
        ConfigError: A field contradicts the basis, or the basis has no cores to train.
    """
    try:
        basis = read_saved(str(config.basis))
    except CheckpointError as error:
        raise CheckpointError(
            f"basis={config.basis!r} cannot be read: {error} Name the folder or hub id of an adapter with factors."
        ) from error
    if CORES[basis.config.core].is_identity:
        raise ConfigError(
            f"basis={config.basis!r} has core={basis.config.core!r}, which has no cores to train, so it cannot be a "
            "basis. Name an adapter with cores, for example of method lotr."
        )
    if basis.config.refers_to_basis and not any(map(is_factor, basis.folder.shapes())):
        raise CheckpointError(
            f"basis={config.basis!r} holds no factors: it keeps those of basis={basis.config.basis!r}. Name that one."
        )
    config.take_structure(basis.config)


def check_basis(plan: Plan, factors: dict[str, Tensor], basis: str) -> None:
    """Refuse a basis that lacks a group of the plan, or has it with another rank (PlanError)."""
    for group in plan.groups:
        keys = group_keys(group)
        if keys["U"] not in factors or keys["V"] not in factors:
            raise PlanError(
                f"basis={basis!r} has no factors for group {group.name!r}. "
                f"{near(group.name, map(group_in, factors))} Adapt the same modules with the same method, modes, core, "
                "blocks and r as the basis."
            )
        (o, k), (r, i) = factors[keys["U"]].shape, factors[keys["V"]].shape
        if (o, i, k, r) != (*group.shape, *group.rank):
            raise PlanError(
                f"basis={basis!r} has group {group.name!r} with blocks ({o}, {i}) and rank ({k}, {r}), and the adapter "
                f"asks for blocks {group.shape} and rank {group.rank}. Use r={k if k == r else (k, r)}."
            )
        for name in group.core.of_basis:
            if keys[name] not in factors or factors[keys[name]].shape != group.core.shapes[name]:
                raise PlanError(
                    f"basis={basis!r} has {name!r} of group {group.name!r} for other layers or projections than the "
                    "adapter. Adapt the same modules as the basis."
                )
