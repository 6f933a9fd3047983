"""Ranks of an adapter: the largest that a budget allows, a budget shared out among groups, ranks set anew."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..math.update import side_by_side
from ..sharing.allocation import Rank, allocate
from ..sharing.plan import Group, Plan
from .adapted import Adapted, Member
from .checks import plain
from .config import LotrConfig
from .group import LotrGroup, NamedNumbers, linear_from
from .layer import LotrLinear
from .targets import plan

Members = dict[LotrGroup, list[tuple[Adapted, Member]]]
#: A group's `U` `(o, k)`, the cores `(sites, k, r)` of each of its parts, `V` `(i, r)`.
Numbers = tuple[Tensor, Sequence[Tensor], Tensor]


def largest_rank(model: nn.Module, config: LotrConfig, budget: int) -> int:
    """Return the largest rank, the same for all groups, with which an adapter trains at most so many numbers.

    Args:
        model: Any model; also one on the meta device.
        config: The adapter's configuration; its `r` is not read, and nothing is changed.
        budget: Trained numbers of the adapter, without a head.

    Returns:
        The rank, at least 1; no larger than the blocks allow.

    Raises:
        ConfigError: Rank 1 is over the budget already, or `rank_pattern` sets ranks of single modules.
        PlanError: See `lotr.plan`.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> largest_rank(base, LotrConfig(method="lotr_joint", target_modules=["0", "1"]), budget=100)
        4
    """
    if config.rank_pattern:
        raise ConfigError(
            f"rank_pattern={config.rank_pattern!r} sets ranks of single modules, and a budget asks for one rank of "
            "all. Leave one of them out."
        )

    config = copy.copy(config)
    config.r = 1
    smallest = plan(model, config)
    check_budget(smallest, budget)
    ranks = range(1, smallest.widest_rank + 1)
    return bisect_right(ranks, budget, key=lambda r: at_rank(smallest, config, (r, r)).n_parameters)


def check_budget(smallest: Plan, budget: int) -> None:
    """Refuse a budget that a plan of rank 1 exceeds.

    Raises:
        ConfigError: The message says what rank 1 costs.
    """
    if budget < smallest.n_parameters:
        raise ConfigError(
            f"budget={budget:,} is less than rank 1 trains: {smallest.n_parameters:,} numbers for {smallest.n_sites} "
            "sites. Allow as many, adapt fewer modules, or share along more modes (method='lotr_joint')."
        )


def at_rank(plan: Plan, config: LotrConfig, ranks: Rank | Mapping[str, Rank]) -> Plan:
    """Return a plan with other ranks: one for all, or one for each group by name."""
    first = {path: parts[0].group.name for path, parts in plan.parts.items()}
    targets = [
        replace(t, rank=ranks[first[t.path]] if isinstance(ranks, Mapping) else ranks) for t in plan.targets
    ]
    return config.plan_for(targets)


def share_out(plan: Plan, energies: Mapping[str, Tensor], budget: int) -> dict[str, Rank]:
    """Return for every group the ranks that keep most of its energy for each trained number.

    Args:
        plan: Groups with free cores, as wide as they may stay.
        energies: Group's name → what each pair of columns of `U` and `V` keeps, `(k, r)`.
        budget: Trained numbers in all; at least what rank 1 costs.
    """
    groups = {group.name: group for group in plan.groups}
    sets = tied(plan)
    costs = [partial(_cost, [groups[name] for name in names], plan.trainable) for names in sets]
    together = [sum((energies[name] for name in names[1:]), energies[names[0]]) for names in sets]
    ranks = allocate(together, costs, budget - plan.n_magnitudes)
    return {name: rank for names, rank in zip(sets, ranks, strict=True) for name in names}


def _cost(groups: Sequence[Group], train: str, k: int, r: int) -> int:
    factors = sum(group.shape[0] * k + group.shape[1] * r for group in groups) if train == "all" else 0
    return factors + sum(replace(g.core, k=k, r=r).n_parameters(len(g.sites)) for g in groups)


def tied(plan: Plan) -> list[list[str]]:
    """Return the names of the groups, together where groups meet in a module: a module has one rank.

    Example:
        >>> from lotr.blocks import Target
        >>> from lotr.grouping import make_plan
        >>> fused = Target("h.0.qv", (8, 4), (2, 2), fused=(("q", 4), ("v", 4)))
        >>> tied(make_plan([fused, Target("h.0.o", (4, 4), (2, 2))], modes=("layer",)))
        [['qv-q_4x4', 'qv-v_4x4'], ['o_4x4']]
    """
    leader = {group.name: group.name for group in plan.groups}
    for parts in plan.parts.values():
        met = {leader[part.group.name] for part in parts}
        first = leader[parts[0].group.name]
        leader = {name: first if of in met else of for name, of in leader.items()}
    sets: dict[str, list[str]] = defaultdict(list)
    for name, of in leader.items():
        sets[of].append(name)
    return list(sets.values())


def members_of(model: nn.Module, adapter: str) -> Members:
    """Return the groups of an adapter, each with its parts in model order."""
    found: Members = {}
    for layer in model.modules():
        if isinstance(layer, LotrLinear) and adapter in layer.lotr_site:
            adapted = layer.adapted(adapter)
            for member in adapted.members:
                found.setdefault(member.group, []).append((adapted, member))
    return found


@torch.no_grad()
def set_ranks(
    config: LotrConfig,
    members: Members,
    ranks: Mapping[str, Rank],
    numbers: Callable[[LotrGroup, Rank], Numbers],
) -> None:
    """Give the groups of an adapter other ranks, in the model and in its configuration, so that it loads with them.

    Args:
        config: The adapter's configuration in the model.
        members: See `members_of`; cores are free.
        ranks: Group's name → `(k, r)`; groups that meet in a module have the same.
        numbers: Returns the new numbers of a group.
    """
    plan = at_rank(config.recorded_plan(), config, ranks)
    for group, found in members.items():
        adapter = found[0][0].adapter
        U, cores, V = numbers(group, ranks[found[0][1].part.group.name])
        _write(group, adapter, U, V)
        for (adapted, member), C in zip(found, cores, strict=True):
            _write_core(adapted, member, C)
    for found in members.values():
        for adapted, member in found:
            n = adapted.members.index(member)
            member.part = plan.parts[member.part.sites[0].module][n]
    (common, _), *_ = Counter(target.rank for target in plan.targets).most_common(1)
    config.r = plain(common)
    config.rank_pattern = {t.path: plain(t.rank) for t in plan.targets if t.rank != common}
    config.targets = [target.to_dict() for target in plan.targets]


def _write(group: LotrGroup, adapter: str, U: Tensor, V: Tensor) -> None:
    for factors, weight in ((group.lotr_U, U), (group.lotr_V, V.T)):
        before = factors[adapter].weight
        factors[adapter] = _like(before, weight)


def _write_core(adapted: Adapted, member: Member, cores: Tensor) -> None:
    held, name = adapted.layer.lotr_C[adapted.adapter], member.part.name
    before = adapted.site_core(member.part)
    C = side_by_side(cores, member.part.grid)
    if isinstance(held, NamedNumbers):
        made = nn.Parameter(C.to(before).contiguous(), requires_grad=before.requires_grad)
        held.register_parameter(name, made)
    else:
        adapted.layer.lotr_C[adapted.adapter] = _like(before, C)


def _like(before: Tensor, weight: Tensor) -> Any:
    made = linear_from(weight.to(before))
    made.weight.requires_grad_(before.requires_grad)
    return made
