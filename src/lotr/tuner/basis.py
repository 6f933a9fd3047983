"""The basis of an adapter that keeps another one's factors: its structure, its numbers, and that they are right."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, PlanError, near
from ..files.adapter_folder import AdapterFolder, read_adapter
from ..math.cores import CORES
from ..sharing.plan import Group, Plan, check_modes
from .config import LotrConfig
from .meaning import checked_rank
from .state_dict import FACTORS, group_keys
from .targets import plan_of

#: Fields in which an adapter is as its basis. The factors are kept, so how they started is one of them.
_STRUCTURE = ("method", "r", "modes", "core", "core_ranks", "blocks", "scaling", "rank_pattern", "init")
#: Fields that name modules; they belong together. Another choice has to fit the groups of the basis: `check_basis`.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def take_structure(config: LotrConfig) -> None:
    """Fill in the structure of the basis where a configuration says nothing.

    Args:
        config: Names a basis; its fields are as the user gave them.

    Raises:
        CheckpointError: There is no such adapter, or it is of another method.
        ConfigError: A field contradicts the basis, or the basis has no cores to train.
    """
    from ..adapters.inspection import config_of  # which reads adapters on a basis, too

    assert config.basis is not None
    try:
        folder = read_adapter(config.basis)
    except CheckpointError as error:
        raise CheckpointError(
            f"basis={config.basis!r} cannot be read: {error} Name the folder or hub id of an adapter with factors."
        ) from error
    of = config_of(folder)
    if CORES[str(of.core)].is_identity:
        raise ConfigError(
            f"basis={config.basis!r} has core={of.core!r}, which has no cores to train, so it cannot be a basis. Name "
            "an adapter with cores, for example of method lotr."
        )
    if of.refers_to_basis and not any(map(_is_factor, folder.shapes())):
        raise CheckpointError(
            f"basis={config.basis!r} holds no factors: it keeps those of basis={of.basis!r}. Name that one."
        )
    for name in _STRUCTURE:
        asked, has = _plain(name, getattr(config, name)), _plain(name, getattr(of, name))
        if asked is None or asked == {}:
            setattr(config, name, has)
        elif asked != has:
            raise ConfigError(
                f"{name}={asked!r} contradicts basis={config.basis!r}, which has {name}={has!r}. An adapter has the "
                "structure of its basis; leave it out."
            )
    config.magnitude = config.magnitude or of.magnitude
    if all(getattr(config, name) is None for name in _TARGETS):
        for name in _TARGETS:
            setattr(config, name, getattr(of, name))


def _plain(name: str, value: Any) -> Any:
    """Return a field as it compares, whichever way it was written."""
    if value is None:
        return None
    if name == "modes":
        return check_modes(value)
    if name == "rank_pattern":
        return {path: checked_rank(path, r) for path, r in value.items()}
    return checked_rank(name, value) if name == "r" else value


def _folder(basis: str) -> AdapterFolder:
    """Return the folder of a basis."""
    try:
        return read_adapter(basis)
    except CheckpointError as error:
        raise CheckpointError(
            f"The basis of the adapter cannot be read: {error} Put its folder where it was or beside the adapter's "
            "own, or name its place in the field basis of adapter_config.json."
        ) from error


def read_basis(config: LotrConfig) -> dict[str, Tensor]:
    """Return the factors that a configuration refers to, under their names in a file.

    Args:
        config: Its `basis` is the path or hub id of a LoTR adapter; a recorded `basis_hash` has to agree.

    Returns:
        `U` and `V` (transposed) of every group, by key.

    Raises:
        CheckpointError: There is no such adapter, it has no factors, or they are others than those trained on.
    """
    assert config.basis is not None
    tensors = factors_of(_folder(config.basis).tensors())
    if not tensors:
        raise CheckpointError(
            f"basis={config.basis!r} holds no factors: it adapts no module, or keeps the factors of another adapter. "
            "Name the adapter whose factors are to be kept."
        )
    found = hash_of(tensors)
    if config.basis_hash is not None and found != config.basis_hash:
        raise CheckpointError(
            f"The factors in basis={config.basis!r} are not those that the adapter was trained on: hash {found}, not "
            f"{config.basis_hash}. Cores mean nothing beside other factors; name the right basis."
        )
    return tensors


def factors_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of an adapter's tensors that are shared factors."""
    return {key: tensor for key, tensor in tensors.items() if _is_factor(key)}


def _is_factor(key: str) -> bool:
    return any(f".{name}." in key for name in FACTORS)


def factors_for(config: LotrConfig) -> dict[str, Tensor]:
    """Return those of the factors that a configuration refers to which its adapter uses, under their names in a file.

    Args:
        config: Of an adapter that was made; the hash is that of the whole basis.

    Returns:
        `U` `(o, k)` and `V` (transposed, `(r, i)`) of every group of the adapter, by key.

    Raises:
        CheckpointError: See `read_basis`.
    """
    return used_by(plan_of(config.made_for, config), read_basis(config))


def used_by(plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a basis's factors that belong to groups of a plan: it may adapt some of the modules alone."""
    mine = {key for group in plan.groups for key in group_keys(group).values()}
    return {key: tensor for key, tensor in tensors.items() if key in mine}


def hash_of(tensors: dict[str, Tensor]) -> str:
    """Return a short hash of factors: their names, types, shapes and every number."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_basis(plan: Plan, tensors: dict[str, Tensor], basis: str) -> None:
    """Refuse a basis that lacks a group of the plan, or has it with another rank.

    Raises:
        PlanError: The message names the group.
    """
    for group in plan.groups:
        U, V = _factors(group, tensors)
        if U is None or V is None:
            known = {key.split(".")[-3] for key in tensors}
            raise PlanError(
                f"basis={basis!r} has no factors for group {group.name!r}. {near(group.name, known)} Adapt the same "
                "modules with the same method, modes, core, blocks and r as the basis."
            )
        (o, k), (r, i) = U.shape, V.shape
        if (o, i, k, r) != (*group.shape, *group.rank):
            raise PlanError(
                f"basis={basis!r} has group {group.name!r} with blocks ({o}, {i}) and rank ({k}, {r}), and the adapter "
                f"asks for blocks {group.shape} and rank {group.rank}. Use r={k if k == r else (k, r)}."
            )


def factors_in(group: Group, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
    """Return the factors of a group of a checked basis."""
    U, V = _factors(group, tensors)
    assert U is not None and V is not None
    return U, V.T


def _factors(group: Group, tensors: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    keys = group_keys(group)
    return tensors.get(keys["U"]), tensors.get(keys["V"])
