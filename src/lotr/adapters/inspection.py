"""What is inside a trained adapter, read from its folder alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.adapter_folder import read_adapter
from ..files.peft_lora import LoraFolder, read_lora
from ..math.update import FactoredUpdate, one_by_one
from ..sharing.blocks import Site, Target
from ..sharing.groups import Group, Part
from ..sharing.keys import core_key, file_shapes, group_keys
from ..sharing.plan import Plan
from ..tuner.config import LotrConfig
from ..tuner.saved_adapter import SavedAdapter, read_saved


@dataclass(frozen=True)
class SiteReport:
    """One site, and the size and effective rank of its update before the magnitude.

    `norm` is `‖ΔW‖_F = σ ‖R_U C R_Vᵀ‖_F`, computed from the triangular factors of `U` and `V`; `rank` is
    the number of directions that carry the update, `exp(entropy of the squared singular values)`.
    """

    module: str
    group: str
    layer: str
    projection: str
    head: int | None
    expert: int | None
    norm: float
    rank: float


@dataclass(frozen=True)
class Inspection:
    """An adapter taken apart.

    Args:
        config: Its configuration.
        groups: Name, sites, block, rank and counts of every group.
        sites: One report a site.
        numbers: Numbers in its file, without the head.
        basis: Numbers in the file of the basis that it refers to.
        head: Numbers of the head.
        size: Bytes of its file.
    """

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


def updates(
    saved: SavedAdapter, tensors: dict[str, Tensor]
) -> Iterator[tuple[Target, list[tuple[Part, FactoredUpdate]]]]:
    """Yield every module with its parts, and their updates in factored form, from `saved.tensors()`."""
    for target in saved.plan.targets:
        parts = []
        for part in saved.plan.parts[target.path]:
            numbers = {name: tensors[key] for name, key in group_keys(part.group).items()}
            core, U = part.group.core, numbers["U"]
            C = tensors[core_key(part)] if core.by_site else part.lay(core.block(numbers, part.region))
            parts.append((part, part.factored(U, C.to(U.dtype), numbers["V"].T, saved.config.scaling)))
        yield target, parts


def inspect(adapter: str | Path) -> Inspection:
    """Take a saved adapter apart.

    Args:
        adapter: Folder or hub id of a LoTR adapter, or of a PEFT LoRA, of which every module is a group of its own.

    Returns:
        Groups, and norm and effective rank of every site's update.

    Raises:
        CheckpointError: The adapter is of another method, adapts no module, or is damaged.
    """
    folder = read_adapter(adapter)
    if folder.config["peft_type"] == "LORA":
        return _inspect_lora(read_lora(folder))
    saved = read_saved(folder)
    plan = saved.plan
    if not plan.targets:
        raise CheckpointError(f"{saved.path} adapts no module: it holds a trained head alone.")
    tensors = saved.tensors()
    sites: list[SiteReport] = []
    for part, update in (pair for _, parts in updates(saved, tensors) for pair in parts):
        R_U, R_V = (torch.linalg.qr(factor.double()).R for factor in (update.U, update.V))
        cores = one_by_one(update.C.double(), update.grid)
        for site, C in zip(part.sites, cores, strict=True):
            sites.append(_report(site, part.group, update.scaling * (R_U @ C @ R_V.T)))
    head = sum(tensors[key].numel() for key in tensors.keys() - file_shapes(plan).keys())
    basis = plan.n_factors if saved.config.refers_to_basis else 0
    numbers = plan.n_factors + plan.n_cores + plan.n_magnitudes - basis
    return Inspection(saved.config, _groups(plan), sites, numbers, basis, head, saved.folder.size)


def _inspect_lora(lora: LoraFolder) -> Inspection:
    targets, triangles = [], {}
    with lora.reader() as read:
        for module, (*experts, out, width) in lora.shapes.items():
            A, B = (matrix.double() for matrix in read(module))
            triangles[module] = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
            n, rank = math.prod(experts), A.shape[-2]
            targets.append(Target(module, (n * out, width), (rank, rank), experts=n if experts else 0))
    config = LotrConfig(method="lora", r=max(target.rank[0] for target in targets))
    config.target_modules = sorted(target.path for target in targets if not target.experts)
    config.target_parameters = sorted(target.path for target in targets if target.experts) or None
    config.targets = [target.to_dict() for target in targets]
    plan = config.plan_for(targets)
    sites = [
        _report(
            site,
            group,
            triangles[site.module] if site.expert is None else triangles[site.module][site.expert],
        )
        for group in plan.groups
        for site in group.sites
    ]
    head = sum(tensor.numel() for tensor in lora.head().values())
    return Inspection(config, _groups(plan), sites, plan.n_parameters, 0, head, lora.folder.size)


def _report(site: Site, group: Group, small: Tensor) -> SiteReport:  # (k, r), with the norm of the update
    norm = float(torch.linalg.norm(small))
    coordinates = site.layer, site.projection, site.head, site.expert
    return SiteReport(site.module, group.name, *coordinates, norm, effective_rank(small))


def _groups(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "group": group.name,
            "sites": len(group.sites),
            "block": group.shape,
            "rank": group.rank,
            "factors": group.n_factors,
            "cores": group.n_cores,
        }
        for group in plan.groups
    ]


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
