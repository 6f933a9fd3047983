"""Updates on given factors: the cores that fit them best, and what those lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..math.update import side_by_side
from ..sharing.blocks import Site
from ..sharing.keys import core_key, group_keys
from ..sharing.plan import Group, Plan
from .diagonal import diagonals
from .fit import Batch, project


class Projection:
    """The factors of a bank, orthonormal or not, on which updates become cores.

    Args:
        plan: The plan of the bank; its cores are free, or one diagonal a site.
        tensors: Its factors by key.
        scaling: `σ` of the bank.
        dtype: Type in which cores are kept.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], scaling: float, dtype: torch.dtype) -> None:
        self.plan, self.scaling, self.dtype = plan, scaling, dtype
        self.bases: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for group in plan.groups:
            keys = group_keys(group)
            factors = tensors[keys["U"]].double(), tensors[keys["V"]].double().T
            self.bases[group.name] = [tuple(torch.linalg.qr(factor)) for factor in factors]

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the numbers of some tasks by key, in float32, and what each module loses, `(n,)`.

        What is lost is `‖Δ − σ U C Vᵀ‖²`, rounding of the cores included.
        """
        numbers: dict[str, Tensor] = {}
        lost: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        by_site: dict[Site, Tensor] = {}
        for group in self.plan.groups:
            for site, (B, A) in zip(group.sites, batch[group.name], strict=True):
                by_site[site], of_site = self._site(group, B, A)
                lost[site.module] = lost[site.module] + of_site
            if not group.core.by_site:  # one diagonal, or one a position along the only mode
                own = [by_site[site] for site in sorted(group.sites, key=group.index.__getitem__)]
                name = next(iter(group.core.shapes))
                numbers[group_keys(group)[name]] = torch.stack(own, 1) if group.core.sizes else own[0]
        for part in (part for parts in self.plan.parts.values() for part in parts):
            if part.group.core.by_site:
                cores = torch.stack([by_site[site] for site in part.sites], 1)
                numbers[core_key(part)] = torch.stack([side_by_side(C, part.grid) for C in cores])
        return {key: tensor.float() for key, tensor in numbers.items()}, dict(lost)

    def _site(self, group: Group, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best numbers of one site, rounded, and what they lose."""
        (Q_U, R_U), (Q_V, R_V) = self.bases[group.name]
        inside, beside = project(B, A, Q_U, Q_V)
        if group.core.by_site:
            own = torch.linalg.pinv(R_U) @ inside @ torch.linalg.pinv(R_V).T / self.scaling
        else:
            own = diagonals(Q_U @ R_U, Q_V @ R_V, B, A) / self.scaling
        own = own.to(self.dtype).double()
        cores = own if group.core.by_site else torch.diag_embed(own)
        return own, beside + (inside - self.scaling * R_U @ cores @ R_V.T).square().sum((1, 2))
