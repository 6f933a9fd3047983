"""Clusters of tasks: each has factors of its own, which stand side by side in the bank's.

To every reader the bank is one on all factors together. A task of a cluster has zeros beside the cores of its own
factors, and only these are kept, exported and counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sharing.blocks import Shape
from ..sharing.groups import Group
from ..sharing.keys import core_key, group_keys
from ..sharing.plan import Plan
from ..tuner.config import LotrConfig
from ..tuner.factors import set_ranks
from ..tuner.saved_adapter import used_by
from .layout import Layout

Ranks = Mapping[str, Shape]  # `(k, r)` by group


@dataclass(frozen=True)
class Cluster:
    """Factors that some tasks share."""

    config: LotrConfig  # of an adapter on these factors alone
    plan: Plan
    first: Ranks  # where they begin among those of the bank

    @property
    def layout(self) -> Layout:
        """The numbers of a task of this cluster."""
        return Layout.of(self.plan)

    def factors(self, of_bank: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `U` and `V` (transposed) of every group, by their key, from those of the bank."""
        factors = used_by(self.plan, of_bank)
        for group in self.plan.groups:
            keys, (k, r), (row, column) = group_keys(group), group.rank, self.first[group.name]
            factors[keys["U"]] = of_bank[keys["U"]][:, row : row + k].contiguous()
            factors[keys["V"]] = of_bank[keys["V"]][column : column + r]
        return factors


def clusters_of(config: LotrConfig, plan: Plan, ranks: Sequence[Ranks]) -> tuple[list[Cluster], Layout]:
    """Return the clusters of a bank with the ranks of each, and how tasks lie in it."""
    first, layout = {group.name: (0, 0) for group in plan.groups}, Layout.of(plan)
    clusters, supports = list[Cluster](), list[Tensor]()
    for own in ranks:
        alone = copy.deepcopy(config)
        of_cluster = set_ranks(alone, own)
        supports.append(_support(plan, of_cluster, first, layout))
        clusters.append(Cluster(alone, of_cluster, first))
        first = {name: (k + own[name][0], r + own[name][1]) for name, (k, r) in first.items()}
    if ranks and first != {group.name: group.rank for group in plan.groups}:
        raise ValueError("their ranks together are not those of the basis")
    return clusters, replace(layout, supports=tuple(supports))


def _support(bank: Plan, own: Plan, first: Ranks, layout: Layout) -> Tensor:  # (n,)
    """Return where the numbers that a cluster's tasks have stand in the flat order of the bank."""
    inside: dict[str, tuple[Tensor, Tensor]] = {}
    for group, of_cluster in zip(bank.groups, own.groups, strict=True):
        inside[group.name] = _inside(group, of_cluster, first[group.name])
    keep: dict[str, Tensor] = {}
    for group in bank.groups:
        if not group.core.by_site:  # diagonals, the rank last
            keep |= {group_keys(group)[name]: inside[group.name][1] for name in group.core.shapes}
    for part in (part for parts in bank.parts.values() for part in parts):
        if part.group.core.by_site:
            (rows, columns), (a, b) = inside[part.group.name], part.grid
            keep[core_key(part)] = rows.repeat(a)[:, None] & columns.repeat(b)
    return torch.cat([keep[key].expand(shape).flatten() for key, shape in layout.shapes.items()]).nonzero()[
        :, 0
    ]


def _inside(group: Group, own: Group, first: Shape) -> tuple[Tensor, Tensor]:  # (k,), (r,)
    """Return which directions of a group are the cluster's, on both sides."""
    sides = []
    for total, begin, count in zip(group.rank, first, own.rank, strict=True):
        at = torch.arange(total)
        sides.append((at >= begin) & (at < begin + count))
    return sides[0], sides[1]
