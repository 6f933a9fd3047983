"""What is inside a trained adapter, read from its folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.adapter_folder import read_adapter
from ..files.peft_lora import LoraFolder, read_lora
from ..math.update import FactoredUpdate, one_by_one
from ..sharing.blocks import Target
from ..sharing.groups import Part
from ..sharing.keys import core_key, file_shapes, group_keys
from ..sharing.paths import coordinates
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
            small = update.scaling * (R_U @ C @ R_V.T)
            norm, rank = float(torch.linalg.norm(small)), effective_rank(small)
            sites.append(
                SiteReport(site.module, part.group.name, site.layer, site.projection, site.head, norm, rank)
            )
    head = sum(tensors[key].numel() for key in tensors.keys() - file_shapes(plan).keys())
    basis = plan.n_factors if saved.config.refers_to_basis else 0
    numbers = plan.n_factors + plan.n_cores + plan.n_magnitudes - basis
    return Inspection(saved.config, _groups(plan), sites, numbers, basis, head, saved.folder.size)


def _inspect_lora(lora: LoraFolder) -> Inspection:
    sites, ranks = [], {}
    places = coordinates(list(lora.shapes))
    with lora.reader() as read:
        for module, (layer, projection) in places.items():
            A, B = read(module)
            small = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.T.double()).R.T
            norm, ranks[module] = float(torch.linalg.norm(small)), len(A)
            sites.append(SiteReport(module, module, layer, projection, None, norm, effective_rank(small)))
    targets = [Target(path, shape, (ranks[path],) * 2) for path, shape in lora.shapes.items()]
    config = LotrConfig(method="lora", r=max(ranks.values()), target_modules=sorted(ranks))
    config.targets = [target.to_dict() for target in targets]
    plan = config.plan_for(targets)
    head = sum(tensor.numel() for tensor in lora.head().values())
    sites = [replace(site, group=plan.parts[site.module][0].group.name) for site in sites]
    return Inspection(config, _groups(plan), sites, plan.n_parameters, 0, head, lora.folder.size)


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
