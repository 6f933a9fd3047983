"""Sums of adapters that are exact."""

from __future__ import annotations

import copy
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from ..errors import ConfigError, PlanError, near
from ..math.magnitude import MAGNITUDES
from .config import LotrConfig
from .factors import Parts, parts_of, set_ranks


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
    parts = {adapter: parts_of(tuner.model, adapter) for adapter in adapters}
    _check_groups(parts, combination_type)
    configs = [cast("LotrConfig", tuner.peft_config[adapter]) for adapter in adapters]
    config = copy.deepcopy(configs[0])
    config.core, config.core_ranks = "free", None
    config.modes = tuple(mode for mode in config.modes if mode != "task")  # a core of a tensor train
    config.init_weights = True  # what is not zero is written below
    config.zero, config.core_init, config.dropout, config.dropout_place = "core", None, 0.0, "input"
    on_one_basis = all(c.refers_to_basis for c in configs) and len({c.basis_hash for c in configs}) == 1
    if not on_one_basis:
        config.scaling, config.trainable, config.init = 1.0, "all", "orthonormal"
        config.basis = config.basis_hash = None
    concatenated = combination_type == "cat" and not on_one_basis
    if concatenated:
        set_ranks(config, _summed_ranks(adapters, parts[adapters[0]]))
    tuner.peft_config[name] = config
    try:
        tuner.inject_adapter(tuner.model, name)
    except Exception:
        del tuner.peft_config[name]
        raise

    with torch.no_grad():
        for group, of_group in parts_of(tuner.model, name).items():
            for factors, dim in ((group.lotr_U, 1), (group.lotr_V, 0)):
                each = [factors[adapter].weight for adapter in adapters]
                factors[name].weight.copy_(torch.cat(each, dim) if concatenated else each[0])
            for key in of_group[0][1].group.biases:
                shares = zip(adapters, weights, strict=True)
                b = sum(w * group.scaling[a] * group.core_numbers(a)[key].double() for a, w in shares)
                group.lotr_core[name].get_parameter(key).copy_(b / config.scaling)
            for n, (layer, part) in enumerate(of_group):
                cores = []
                for adapter, weight in zip(adapters, weights, strict=True):
                    C = layer.core(adapter, parts[adapter][group][n][1], group).double()
                    cores.append(weight * layer.scaling[adapter] / config.scaling * part.cores(C))
                summed = _on_the_diagonal(cores) if concatenated else torch.stack(cores).sum(0)
                layer.site_core(name, part).copy_(part.lay(summed))


def _on_the_diagonal(cores: list[Tensor]) -> Tensor:  # each (sites, k, r) -> (sites, Σk, Σr)
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*cores, strict=True)])


def _summed_ranks(adapters: list[str], parts: Parts) -> dict[str, tuple[int, int]]:
    """Return the ranks of factors side by side; more columns than a block has features would be cut."""
    ranks = {}
    for group, of_group in parts.items():
        plan, (o, i) = of_group[0][1].group, (group.out_features, group.in_features)
        k = sum(group.lotr_U[adapter].weight.shape[1] for adapter in adapters)
        r = sum(group.lotr_V[adapter].weight.shape[0] for adapter in adapters)
        if k > o or r > i:
            raise PlanError(
                f"The ranks of {', '.join(adapters)} add up to ({k}, {r}) in group {plan.name!r}, whose "
                f"blocks are ({o}, {i}). Truncate the adapters first "
                "(lotr.truncate), or merge them one after the other."
            )
        ranks[plan.name] = (k, r)
    return ranks


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
    for adapter in adapters:
        rule = cast("LotrConfig", tuner.peft_config[adapter]).magnitude
        if not MAGNITUDES[rule].additive:
            raise ConfigError(
                f"Adapter {adapter!r} has magnitude={rule!r}, which rescales the "
                "weight, so updates do not add up. Merge the adapters one after the other instead."
            )
    for path, module in tuner.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not module._adapters.isdisjoint(adapters):
            raise ConfigError(
                f"Module {path!r} was trained beside these adapters (modules_to_save, which task_type may add, or "
                "trainable_token_indices) and has no sum. Merge the adapters one after the other instead."
            )


def _check_groups(parts: dict[str, Parts], combination: str) -> None:
    names = ", ".join(parts)
    first, *others = (
        {
            group: [(layer, part.name, part.group.biases) for layer, part in of_group]
            for group, of_group in of_adapter.items()
        }
        for of_adapter in parts.values()
    )
    if any(other != first for other in others):
        raise ConfigError(
            f"Adapters {names} do not adapt the same modules with the same groups, so their "
            "sum is not one adapter. Merge them one after the other instead."
        )
    if combination == "linear":
        weights = [[f[a].weight for group in first for f in (group.lotr_U, group.lotr_V)] for a in parts]
        if not all(torch.equal(W, W0) for of_a in weights for W, W0 in zip(of_a, weights[0], strict=True)):
            raise ConfigError(
                f"Adapters {names} have different factors, so adding cores is not exact. "
                "Use combination_type='cat'."
            )
