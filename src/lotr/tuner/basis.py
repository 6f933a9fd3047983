"""The basis of an adapter that keeps another one's factors: where they come from, and that they are the right ones."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..checkpoint import read_adapter
from ..errors import CheckpointError, PlanError, near
from ..sites import Group, Plan
from .config import LotrConfig
from .state import FACTORS, group_keys


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
    try:
        adapter = read_adapter(config.basis)
    except CheckpointError as error:
        raise CheckpointError(
            f"The basis of the adapter cannot be read: {error} Put its folder where it was or beside the adapter's "
            "own, or name its place in the field basis of adapter_config.json."
        ) from error
    tensors = factors_of(adapter.tensors())
    if not tensors:
        raise CheckpointError(
            f"basis={config.basis!r} holds no factors: it is of another method, or refers to a basis itself. Name the "
            "adapter whose factors are to be kept."
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
    return {key: tensor for key, tensor in tensors.items() if any(f".{name}." in key for name in FACTORS)}


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
