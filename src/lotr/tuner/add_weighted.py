"""Sums of adapters that are exact."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..errors import ConfigError, near
from ..math.magnitude import MAGNITUDES
from ..math.update import one_by_one, side_by_side
from ..sharing.paths import normalise
from .group import LotrGroup
from .layer import LotrLinear

if TYPE_CHECKING:
    from .config import LotrConfig
    from .model import LotrModel


def add_weighted(
    tuner: LotrModel, adapters: list[str], weights: list[float], name: str, combination_type: str
) -> None:
    """Add an adapter whose update is `Σ_a weight_a · ΔW_a`, without any approximation.

    `cat`: factors side by side, cores as blocks on the diagonal; the ranks add up.
    `linear`: cores added; exact only where the adapters have the same factors, and refused elsewhere.

    Adapters that refer to one basis have its factors, so their cores are added either way, and the new adapter refers
    to that basis too: `Σ_a weight_a · σ_a · U C_a Vᵀ = U (Σ_a weight_a · σ_a · C_a) Vᵀ`. Any other sum stands alone.

    The new adapter has free cores whatever those of the adapters are: they hold every sum exactly.

    Args:
        tuner: The model.
        adapters: Names of adapters with the same groups.
        weights: One factor each, no unit; negative ones subtract.
        name: Name of the new adapter.
        combination_type: `"cat"` or `"linear"`.

    Raises:
        ConfigError: An adapter is unknown, the adapters do not fit each other, or the sum is not exact.
        CheckpointError: The basis of the adapters cannot be read any more.
        PlanError: The ranks add up to more than a block allows.
    """
    _check(tuner, adapters, weights, name, combination_type)
    configs = _configs(tuner)
    config = copy.deepcopy(configs[adapters[0]])
    config.core, config.core_ranks = "free", None
    config.init_weights = True  # what is not zero is written below
    refers = _one_basis([configs[adapter] for adapter in adapters])
    if not refers:
        config.scaling, config.trainable, config.init = 1.0, "all", "orthonormal"
        config.basis = config.basis_hash = None
    concatenated = combination_type == "cat" and not refers
    if concatenated:
        config.r = _sum([configs[adapter].rank for adapter in adapters])
        config.rank_pattern = {
            normalise(path): rank
            for path, module in tuner.model.named_modules()
            if isinstance(module, LotrLinear) and adapters[0] in module.parts
            if (rank := _sum([_rank(module, adapter) for adapter in adapters])) != config.r
        }
    tuner.peft_config[name] = config
    try:
        tuner.inject_adapter(tuner.model, name)
    except Exception:
        del tuner.peft_config[name]
        raise

    join = _joined if concatenated else _same_factor
    with torch.no_grad():
        for module in tuner.model.modules():
            if isinstance(module, LotrGroup) and name in module.lotr_U:
                U = [module.lotr_U[adapter].weight for adapter in adapters]
                Vt = [module.lotr_V[adapter].weight for adapter in adapters]
                module.lotr_U[name].weight.copy_(join(U, dim=1))
                module.lotr_V[name].weight.copy_(join(Vt, dim=0))
            elif isinstance(module, LotrLinear) and name in module.parts:
                for n, (part, _) in enumerate(module.parts[name]):
                    cores = [
                        w * module.scaling[a] / config.scaling * _cores(module, a, n)
                        for a, w in zip(adapters, weights, strict=True)
                    ]
                    summed = _on_the_diagonal(cores) if concatenated else torch.stack(cores).sum(0)
                    C = side_by_side(summed, part.grid)
                    module.site_core(name, part).copy_(C)


def _one_basis(configs: list[LotrConfig]) -> bool:
    """Whether adapters have the factors of one basis, to which their files refer."""
    return all(c.refers_to_basis for c in configs) and len({c.basis_hash for c in configs}) == 1


def _rank(module: LotrLinear, adapter: str) -> tuple[int, int]:
    part, _ = module.parts[adapter][0]
    return part.group.rank


def _cores(module: LotrLinear, adapter: str, n: int) -> Tensor:  # (a·b, k, r)
    """Return the cores of the n-th part of a module, one a site."""
    update = module.factored(adapter)[n]
    return one_by_one(update.C, update.grid)


def _on_the_diagonal(cores: list[Tensor]) -> Tensor:  # each (sites, k, r) -> (sites, Σk, Σr)
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*cores, strict=True)])


def _sum(ranks: Iterable[Iterable[int]]) -> int | tuple[int, int]:
    k, r = (sum(sizes) for sizes in zip(*ranks, strict=True))
    return k if k == r else (k, r)


def _joined(factors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(factors, dim=dim)


def _same_factor(factors: list[Tensor], dim: int) -> Tensor:
    return factors[0]


def _configs(tuner: LotrModel) -> dict[str, LotrConfig]:
    return cast("dict[str, LotrConfig]", tuner.peft_config)


def _check(tuner: LotrModel, adapters: list[str], weights: list[float], name: str, combination: str) -> None:
    if combination not in ("cat", "linear"):
        raise ConfigError(
            f"combination_type={combination!r} is not exact for this method. Use 'cat', or 'linear' for "
            "adapters with the same factors."
        )
    if name in tuner.peft_config:
        raise ConfigError(
            f"Adapter {name!r} exists already. Choose another adapter_name, or delete it first."
        )
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ConfigError(f"Adapter {adapter!r} does not exist. {near(adapter, tuner.peft_config)}")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights. Give one weight an adapter.")
    rules = {a: str(_configs(tuner)[a].magnitude) for a in adapters}
    scaled = [a for a in adapters if not MAGNITUDES[rules[a]].additive]
    if scaled:
        raise ConfigError(
            f"Adapter {scaled[0]!r} has magnitude={rules[scaled[0]]!r}, which rescales the "
            "weight, so updates do not add up. Merge the adapters one after the other instead."
        )
    have = {adapter: _has(tuner, adapter) for adapter in adapters}
    if len({frozenset(names) for names in have.values()}) > 1:
        raise ConfigError(
            f"Adapters {', '.join(adapters)} do not adapt the same modules with the same groups, so their "
            "sum is not one adapter. Merge them one after the other instead."
        )
    if combination == "linear":
        for module in tuner.model.modules():
            if isinstance(module, LotrGroup) and not _same(module, adapters):
                raise ConfigError(
                    f"Adapters {', '.join(adapters)} have different factors, so adding cores is not exact. "
                    "Use combination_type='cat'."
                )


def _has(tuner: LotrModel, adapter: str) -> set[str]:
    return {
        path
        for path, module in tuner.model.named_modules()
        if (isinstance(module, LotrGroup) and adapter in module.lotr_U)
        or (isinstance(module, LotrLinear) and adapter in module.parts)
    }


def _same(group: LotrGroup, adapters: list[str]) -> bool:
    present = [adapter for adapter in adapters if adapter in group.lotr_U]
    return all(
        torch.equal(factors[present[0]].weight, factors[adapter].weight)
        for factors in (group.lotr_U, group.lotr_V)
        for adapter in present[1:]
    )
