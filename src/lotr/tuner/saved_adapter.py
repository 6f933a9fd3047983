"""A saved adapter: its folder, configuration and plan, read together, and its numbers with those of its basis."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.adapter_folder import AdapterFolder, read_adapter
from ..sharing.keys import file_shapes, group_keys, is_factor
from ..sharing.plan import Plan
from .config import LotrConfig


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter of this library in its folder, and its plan as the configuration records it."""

    folder: AdapterFolder
    config: LotrConfig
    plan: Plan

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    def factors(self) -> dict[str, Tensor]:
        """Return the shared factors `U` and `V` (transposed) by key: its own, or those of the basis it refers to.

        Raises:
            CheckpointError: They are damaged, missing, or others than those that the adapter was trained on.
        """
        return read_basis(self.config) if self.config.refers_to_basis else factors_of(self.folder.tensors())

    def head(self) -> dict[str, Tensor]:
        """Return what was trained in full, by key."""
        planned = file_shapes(self.plan, factors=True)
        return {key: tensor for key, tensor in self.folder.tensors().items() if key not in planned}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by key, the factors of a basis among them; the head is what the plan does not name.

        Raises:
            CheckpointError: A tensor is missing, has another shape than planned, or belongs to nothing.
        """
        self.folder.check_one()
        tensors = self.folder.tensors()
        if self.config.refers_to_basis:
            tensors |= used_by(self.plan, read_basis(self.config))
        shapes = file_shapes(self.plan)
        for key, shape in shapes.items():
            if key not in tensors:
                raise CheckpointError(f"{self.path} lacks {key!r}. The file is not whole.")
            if tuple(tensors[key].shape) != shape:
                raise CheckpointError(
                    f"{self.path}: {key!r} has shape {tuple(tensors[key].shape)}, and the configuration tells of "
                    f"{shape}. The two files were put together from different adapters."
                )
        extra = [key for key in tensors if ".lotr_" in key and key not in shapes]
        if extra:
            raise CheckpointError(
                f"{self.path} has {len(extra)} tensors that its configuration does not tell of, first {extra[0]!r}. "
                "The two files were put together from different adapters."
            )
        return tensors


def read_saved(adapter: str | Path | AdapterFolder) -> SavedAdapter:
    """Read configuration and plan of an adapter of this library, from its folder or hub id; its tensors on demand.

    Raises:
        CheckpointError: There is no such adapter, it is of another method or format, or its configuration is damaged.
    """
    folder = adapter if isinstance(adapter, AdapterFolder) else read_adapter(adapter)
    if not folder.is_lotr:
        raise CheckpointError(
            f"{folder.path} holds an adapter of the method {folder.config['peft_type']}, not of this library. "
            "PEFT itself can load and merge it, and `lotr compress` puts LoRAs into a bank."
        )
    try:
        config = LotrConfig.read(str(folder.path))
    except CheckpointError as error:
        raise CheckpointError(f"{folder.path} cannot be read. {error}") from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"The configuration in {folder.path} does not hold: {error}") from error
    try:
        return SavedAdapter(folder, config, config.recorded_plan())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The field targets of the configuration in {folder.path} is damaged: {error!r}"
        ) from None


def read_basis(config: LotrConfig) -> dict[str, Tensor]:
    """Return the factors `U` and `V` (transposed) of the basis of a configuration, by key.

    Raises:
        CheckpointError: There is no such adapter, it has no factors, or they are others than those trained on.
    """
    try:
        tensors = factors_of(read_adapter(str(config.basis)).tensors())
    except CheckpointError as error:
        raise CheckpointError(
            f"The basis of the adapter cannot be read: {error} Put its folder where it was or beside the adapter's "
            "own, or name its place in the field basis of adapter_config.json."
        ) from error
    if not tensors:
        raise CheckpointError(
            f"basis={config.basis!r} holds no factors: it adapts no module, or keeps the factors of another adapter. "
            "Name the adapter whose factors are to be kept."
        )
    digest = hash_of(tensors)
    if config.basis_hash is not None and digest != config.basis_hash:
        raise CheckpointError(
            f"The factors in basis={config.basis!r} are not those that the adapter was trained on: hash {digest}, not "
            f"{config.basis_hash}. Cores mean nothing beside other factors; name the right basis."
        )
    return tensors


def factors_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of an adapter's tensors that are shared factors."""
    return {key: tensor for key, tensor in tensors.items() if is_factor(key)}


def used_by(plan: Plan, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a basis's factors that belong to groups of a plan: it may adapt some of the modules alone."""
    keys = {key for group in plan.groups for key in group_keys(group).values()}
    return {key: tensor for key, tensor in factors.items() if key in keys}


def hash_of(tensors: dict[str, Tensor]) -> str:
    """Return a short hash of factors: their names, types, shapes and every number."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
