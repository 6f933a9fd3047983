"""What is inside a trained adapter, read from its folder alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.adapter_folder import AdapterFolder
from ..math.update import FactoredUpdate, one_by_one, side_by_side
from ..sharing.parts import Part
from ..sharing.plan import Plan
from ..tuner.basis import read_basis, used_by
from ..tuner.config import LotrConfig
from ..tuner.state_dict import core_key, file_shapes, group_keys
from ..tuner.targets import plan_of
from . import plots


@dataclass(frozen=True)
class Taken:
    """An adapter taken apart: its plan, every part of every module in factored form, and the rest (the head)."""

    plan: Plan
    parts: list[tuple[Part, FactoredUpdate]]
    rest: dict[str, Tensor]


@dataclass(frozen=True)
class SiteReport:
    """One site: its place, and the size and effective rank of its update before the magnitude.

    `norm` is `‖ΔW‖_F = σ ‖R_U C R_Vᵀ‖_F`, computed from the triangular factors of `U` and `V`; `rank` is
    the number of directions that carry the update, `exp(entropy of the squared singular values)`.
    """

    module: str
    group: str
    layer: str
    projection: str
    head: int | None
    norm: float
    rank: float


@dataclass(frozen=True)
class Inspection:
    """An adapter taken apart."""

    config: LotrConfig
    groups: list[dict[str, Any]]
    sites: list[SiteReport]
    numbers: int
    basis: int
    head: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "config": self.config.to_dict(), "sites": [asdict(site) for site in self.sites]}


def config_of(adapter: AdapterFolder) -> LotrConfig:
    """Return the configuration of a LoTR adapter.

    Raises:
        CheckpointError: The adapter is of another method, or its configuration does not hold.
    """
    if not adapter.is_lotr:
        raise CheckpointError(
            f"{adapter.path} holds an adapter of the method {adapter.config['peft_type']}, not of this library. "
            "PEFT itself can load and merge it."
        )
    try:
        config: LotrConfig = LotrConfig.from_peft_type(**adapter.config)
        config.look_for_basis(adapter.path)
        return config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The configuration in {adapter.path} does not hold: {error}") from error


def take_apart(adapter: AdapterFolder) -> Taken:
    """Read the numbers of an adapter; the plan that gives them a place follows from the configuration.

    Raises:
        CheckpointError: A number is missing, has another shape than planned, or belongs to nothing.
    """
    config = config_of(adapter)
    try:
        targets = config.made_for
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The field targets of the configuration in {adapter.path} is damaged: {error!r}"
        ) from None
    if not targets:
        raise CheckpointError(f"{adapter.path} adapts no module: it holds a trained head alone.")
    plan = plan_of(targets, config)
    tensors = adapter.tensors()
    if config.refers_to_basis:
        tensors |= used_by(plan, read_basis(config))
    known = file_shapes(plan)
    for key, shape in known.items():
        if key not in tensors:
            raise CheckpointError(f"{adapter.path} lacks {key!r}. The file is not whole.")
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{adapter.path}: {key!r} has shape {tuple(tensors[key].shape)}, and the configuration tells of "
                f"{shape}. The two files were put together from different adapters."
            )
    rest = {key: tensor for key, tensor in tensors.items() if key not in known}
    extra = [key for key in rest if ".lotr_" in key]
    if extra:
        raise CheckpointError(
            f"{adapter.path} has {len(extra)} tensors that its configuration does not tell of, first {extra[0]!r}. "
            "The two files were put together from different adapters."
        )
    found = []
    for target in targets:
        for part in plan.parts[target.path]:
            numbers = {name: tensors[key] for name, key in group_keys(part.group).items()}
            core = part.group.core
            U, Vt = numbers["U"], numbers["V"]
            made = None if core.by_site else side_by_side(core.block(numbers, part.region), part.grid)
            C = tensors[core_key(part)] if made is None else made.to(U.dtype)
            found.append((part, FactoredUpdate(U, C, Vt.T, config.scaling, part.grid)))
    return Taken(plan, found, rest)


def inspect(adapter: AdapterFolder) -> Inspection:
    """Take an adapter apart.

    Args:
        adapter: A LoTR adapter.

    Returns:
        Groups, and norm and effective rank of every site's update.

    Raises:
        CheckpointError: The adapter is of another method or damaged.
    """
    taken = take_apart(adapter)
    sites: list[SiteReport] = []
    for part, update in taken.parts:
        R_U, R_V = (torch.linalg.qr(factor.double()).R for factor in (update.U, update.V))
        cores = one_by_one(update.C.double(), update.grid)
        for site, C in zip(part.sites, cores, strict=True):
            small = update.scaling * (R_U @ C @ R_V.T)
            norm, rank = float(torch.linalg.norm(small)), effective_rank(small)
            sites.append(
                SiteReport(site.module, part.group.name, site.layer, site.projection, site.head, norm, rank)
            )
    groups = [
        {
            "group": group.name,
            "sites": len(group.sites),
            "block": group.shape,
            "rank": group.rank,
            "factors": group.n_factors,
            "cores": group.n_cores,
        }
        for group in taken.plan.groups
    ]
    plan = taken.plan
    numbers = plan.n_factors + plan.n_cores + plan.n_magnitudes
    head = sum(tensor.numel() for tensor in taken.rest.values())
    config = config_of(adapter)
    basis = plan.n_factors if config.refers_to_basis else 0
    return Inspection(config, groups, sites, numbers - basis, basis, head, adapter.size)


def effective_rank(matrix: Tensor) -> float:  # (k, r)
    """Return how many directions carry a matrix: `exp(H(p))`, `p` the normalised squared singular values.

    Example:
        >>> round(effective_rank(torch.eye(3)), 4), effective_rank(torch.zeros(2, 2))
        (3.0, 0.0)
    """
    energy = torch.linalg.svdvals(matrix.double()) ** 2
    if float(energy.sum()) == 0.0:
        return 0.0
    p = energy / energy.sum()
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-300))).sum()))


def draw(found: Inspection, path: Path) -> None:
    """Draw the norms of the updates by layer and projection.

    Args:
        found: See `inspect`.
        path: PNG file.
    """
    places = [(site.layer, site.projection) for site in found.sites]
    norms = [site.norm for site in found.sites]
    plots.by_place(places, norms, "norm of the update, ‖ΔW‖", path, together=np.linalg.norm)
