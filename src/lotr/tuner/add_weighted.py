"""Sums of adapters that are exact."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from ..errors import ConfigError, PlanError, near
from ..math.magnitude import MAGNITUDES
from ..math.update import one_by_one, side_by_side
from ..sharing.paths import normalise
from .config import LotrConfig
from .group import LotrGroup
from .layer import LotrLinear


def add_weighted(
    tuner: BaseTuner, adapters: list[str], weights: list[float], name: str, combination_type: str
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
        _check_fits(tuner, adapters)
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

    with torch.no_grad():
        for module in tuner.model.modules():
            if isinstance(module, LotrGroup) and name in module.lotr_U:
                for factors, dim in ((module.lotr_U, 1), (module.lotr_V, 0)):
                    weights_of = [factors[adapter].weight for adapter in adapters]
                    factors[name].weight.copy_(torch.cat(weights_of, dim) if concatenated else weights_of[0])
            elif isinstance(module, LotrLinear) and name in module.parts:
                for n, (part, _) in enumerate(module.parts[name]):
                    cores = [
                        w * module.scaling[a] / config.scaling * _cores(module, a, n)
                        for a, w in zip(adapters, weights, strict=True)
                    ]
                    summed = _on_the_diagonal(cores) if concatenated else torch.stack(cores).sum(0)
                    C = side_by_side(summed, part.grid)
                    module.site_core(name, part).copy_(C)


def _check_fits(tuner: BaseTuner, adapters: list[str]) -> None:
    """Refuse factors side by side that have more columns than the block has features: they would be cut."""
    for path, module in tuner.model.named_modules():
        if not isinstance(module, LotrGroup) or adapters[0] not in module.lotr_U:
            continue
        k = sum(module.lotr_U[adapter].weight.shape[1] for adapter in adapters)
        r = sum(module.lotr_V[adapter].weight.shape[0] for adapter in adapters)
        if k > module.out_features or r > module.in_features:
            raise PlanError(
                f"The ranks of {', '.join(adapters)} add up to ({k}, {r}) in group {path.rpartition('.')[2]!r}, whose "
                f"blocks are ({module.out_features}, {module.in_features}). Truncate the adapters first "
                "(lotr.truncate), or merge them one after the other."
            )


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


def _configs(tuner: BaseTuner) -> dict[str, LotrConfig]:
    return cast("dict[str, LotrConfig]", tuner.peft_config)


def _check(tuner: BaseTuner, adapters: list[str], weights: list[float], name: str, combination: str) -> None:
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


def _has(tuner: BaseTuner, adapter: str) -> set[str]:
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
