"""The groups of one adapter in a model: which parts use them, whether their factors may turn, and other ranks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import ConfigError, near
from ..math.magnitude import MAGNITUDES
from ..sharing.groups import Part
from ..sharing.paths import exactly
from ..sharing.plan import Plan
from .checks import checked_rank
from .config import LotrConfig
from .group import LotrGroup
from .weight import AdaptedWeight

#: The groups of an adapter, each with its parts in model order.
Parts = dict[LotrGroup, list[tuple[AdaptedWeight, Part]]]


def find_adapter(model: nn.Module, adapter: str | None) -> tuple[str, LotrConfig]:
    """Return name and configuration, to be changed, of an adapter; default: the active one.

    Raises:
        ConfigError: The model has no adapter of this library or none of that name, or several are active.
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedWeight)]
    if not layers:
        raise ConfigError(
            f"The model ({type(model).__name__}) has no adapter of this library. Give the PEFT model: what "
            "get_peft_model(model, LotrConfig()) or PeftModel.from_pretrained returned."
        )
    known = {name for layer in layers for name in layer.adapters}
    if adapter is not None and adapter not in known:
        raise ConfigError(f"Adapter {adapter!r} does not exist. {near(adapter, known)}")
    names = {name for layer in layers for name in layer.active_adapters} if adapter is None else {adapter}
    if len(names) != 1:
        raise ConfigError(
            f"Adapters {sorted(names)} are active, and one is changed at a time. Name one of {sorted(known)} as "
            "adapter."
        )
    (name,) = names
    configs = (getattr(module, "peft_config", None) or {} for module in model.modules())
    of_model = next(of_model for of_model in configs if name in of_model)
    # what is changed here is changed for this adapter alone, though one object may describe several
    of_model[name] = copy.copy(of_model[name])
    return name, of_model[name]


def parts_of(model: nn.Module, adapter: str) -> Parts:
    """Return the groups of an adapter, each with its parts in model order."""
    parts: Parts = {}
    for layer in model.modules():
        if isinstance(layer, AdaptedWeight) and adapter in layer.adapters:
            for part, group in layer.adapters[adapter].parts:
                parts.setdefault(group, []).append((layer, part))
    return parts


def check_fresh(adapter: str, config: LotrConfig, parts: Parts) -> None:
    """Refuse an adapter whose factors may not turn, because other ones would change the model."""
    stack = next((layer for of_group in parts.values() for layer, _ in of_group if layer.experts), None)
    if stack is not None:
        raise ConfigError(
            f"Adapter {adapter!r} has experts that one parameter holds, and their gradients are not watched. Leave the "
            "call out, or adapt modules alone."
        )
    if config.core == "identity":
        raise ConfigError(
            f"Adapter {adapter!r} has core='identity': its factors are the update itself, and no core between them is "
            "zero. Make the adapter with another core, for example core='free'."
        )
    if config.refers_to_basis:
        raise ConfigError(
            f"The factors are those of basis={config.basis!r}, to which the cores will refer, so they stay. "
            "Leave the call out, or the basis."
        )
    if MAGNITUDES[str(config.magnitude)].divides_by_update:
        raise ConfigError(
            f"Adapter {adapter!r} has magnitude={config.magnitude!r}, which divides by the norm of the update, so the "
            "update never is zero and other factors would change the model. Leave the call out, or make the adapter "
            "with another magnitude."
        )
    if config.zero != "core":
        raise ConfigError(
            f"Adapter {adapter!r} has zero={config.zero!r}: its cores are not zero, so other factors would change the "
            'model. Make the adapter with zero="core".'
        )
    for group, of_group in parts.items():
        core = of_group[0][1].group.core
        if core.by_site:
            numbers = [C for layer, _ in of_group for C in layer.lotr_C[adapter].parameters()]
        else:
            numbers = [group.lotr_core[adapter].get_parameter(core.zero)]
        if any(bool(number.any()) for number in numbers):
            raise ConfigError(
                f"The update of adapter {adapter!r} is not zero, so other factors would change the model. "
                "Start before training, with init_weights=True."
            )


@torch.no_grad()
def set_factors(group: LotrGroup, adapter: str, U: Tensor, V: Tensor) -> None:
    """Write `U` `(o, k)` and `V` `(i, r)` over those of an adapter."""
    group.lotr_U[adapter].weight.copy_(U)
    group.lotr_V[adapter].weight.copy_(V.T)


def set_ranks(config: LotrConfig, ranks: Mapping[str, tuple[int, int]]) -> Plan:
    """Give the groups other ranks in a configuration, so that the adapter loads with them; return the plan.

    A module has one rank: of groups that meet in a module, all have the largest.
    """
    plan = config.recorded_plan()
    ranks, before = dict(ranks), None
    while ranks != before:  # groups of one module meet others in the next
        before = dict(ranks)
        for parts in plan.parts.values():
            names = {part.group.name for part in parts}
            largest = max(ranks[name][0] for name in names), max(ranks[name][1] for name in names)
            ranks |= dict.fromkeys(names, largest)
    targets = [replace(t, rank=ranks[plan.parts[t.path][0].group.name]) for t in plan.targets]
    (common, _), *_ = Counter(target.rank for target in targets).most_common(1)
    config.r = checked_rank("r", common)
    config.rank_pattern = {exactly(t.path): checked_rank("r", t.rank) for t in targets if t.rank != common}
    config.targets = [target.to_dict() for target in targets]
    return config.plan_for(targets)
