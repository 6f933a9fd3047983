"""What is inside a trained adapter, read from its folder alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import plots
from .checkpoint import AdapterFolder
from .errors import CheckpointError
from .paths import coordinates
from .tuner.config import LotrConfig
from .tuner.targets import BASIS


@dataclass(frozen=True)
class Factors:
    """The numbers of one module: `U (o, k)`, `C (k, r)`, `V (i, r)`, and where they belong."""

    module: str
    group: str
    U: Tensor
    C: Tensor
    V: Tensor


@dataclass(frozen=True)
class SiteReport:
    """One site: its place, and the size and effective rank of its update.

    `norm` is `‖ΔW‖_F = σ ‖R_U C R_Vᵀ‖_F`, computed from the triangular factors of `U` and `V`; `rank` is
    the number of directions that carry the update, `exp(entropy of the squared singular values)`.
    """

    module: str
    group: str
    layer: str
    projection: str
    norm: float
    rank: float


@dataclass(frozen=True)
class Inspection:
    """An adapter taken apart."""

    config: LotrConfig
    groups: list[dict[str, Any]]
    sites: list[SiteReport]
    numbers: int
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
        return LotrConfig.from_peft_type(**adapter.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The configuration in {adapter.path} does not hold: {error}") from error


def factors_of(adapter: AdapterFolder) -> tuple[list[Factors], dict[str, Tensor]]:
    """Read the numbers of every site, and the tensors that belong to no site (the head).

    Raises:
        CheckpointError: A group lacks a factor, or shapes do not fit each other.
    """
    config = config_of(adapter)
    if not config.groups:
        raise CheckpointError(f"{adapter.path} adapts no module: it holds a trained head alone.")
    tensors = adapter.tensors()
    cores = {key: value for key, value in tensors.items() if key.endswith(".lotr_C.weight")}
    shared = {key: value for key, value in tensors.items() if f".{BASIS}." in key}
    rest = {key: value for key, value in tensors.items() if key not in cores and key not in shared}
    found = []
    for name, paths in (config.groups or {}).items():
        U, Vt = (shared.get(f"base_model.model.{BASIS}.{name}.lotr_{part}.weight") for part in "UV")
        if U is None or Vt is None:
            raise CheckpointError(
                f"{adapter.path} lacks the factors of group {name!r}. The file is not whole."
            )
        for path in paths:
            C = cores.get(f"base_model.model.{path}.lotr_C.weight")
            if C is None:
                raise CheckpointError(f"{adapter.path} lacks the core of {path!r}. The file is not whole.")
            if U.shape[1] != C.shape[0] or Vt.shape[0] != C.shape[1]:
                raise CheckpointError(
                    f"{adapter.path}: the core of {path!r} is {tuple(C.shape)}, but its group {name!r} has factors "
                    f"of rank ({U.shape[1]}, {Vt.shape[0]}). The file was put together from different adapters."
                )
            found.append(Factors(path, name, U, C, Vt.T))
    if len(found) != len(cores):
        raise CheckpointError(
            f"{adapter.path} has {len(cores)} cores, and its configuration tells of {len(found)} modules. The two "
            "files were put together from different adapters."
        )
    return found, rest


def inspect(adapter: AdapterFolder) -> Inspection:
    """Take an adapter apart.

    Args:
        adapter: A LoTR adapter.

    Returns:
        Groups, and norm and effective rank of every site's update.

    Raises:
        CheckpointError: The adapter is of another method or damaged.
    """
    config = config_of(adapter)
    factors, rest = factors_of(adapter)
    # from all paths at once, as the tuner does: a name is told apart only beside the others
    pattern = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    places = coordinates([f.module for f in factors], pattern or ())
    groups, sites, numbers = [], [], 0
    for name in config.groups or {}:
        members = [f for f in factors if f.group == name]
        U, C, V = members[0].U, members[0].C, members[0].V
        R_U, R_V = (torch.linalg.qr(factor.double()).R for factor in (U, V))
        for f in members:
            small = config.scaling * (R_U @ f.C.double() @ R_V.T)
            norm, rank = float(torch.linalg.norm(small)), effective_rank(small)
            sites.append(SiteReport(f.module, name, *places[f.module], norm, rank))
        cores = sum(f.C.numel() for f in members)
        numbers += U.numel() + V.numel() + cores
        groups.append(
            {
                "group": name,
                "sites": len(members),
                "block": (U.shape[0], V.shape[0]),
                "rank": tuple(C.shape),
                "factors": U.numel() + V.numel(),
                "cores": cores,
            }
        )
    head = sum(tensor.numel() for tensor in rest.values())
    return Inspection(config, groups, sites, numbers, head, adapter.size)


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
    layers = sorted({site.layer for site in found.sites}, key=_natural)
    projections = list(dict.fromkeys(site.projection for site in found.sites))
    norms = np.full((len(layers), len(projections)), np.nan)
    for site in found.sites:
        norms[layers.index(site.layer), projections.index(site.projection)] = site.norm
    plots.heat_map(norms, layers, projections, "norm of the update, ‖ΔW‖", path)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]
