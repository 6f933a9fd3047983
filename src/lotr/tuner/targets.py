"""From a model and a configuration to the plan: which modules are adapted, and how they share."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, cast

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import ConfigError, PlanError
from ..sharing.blocks import Target
from ..sharing.keys import BASIS
from ..sharing.paths import normalise
from ..sharing.plan import Plan
from .adaptable import check_adaptable
from .attention import fused_projections, heads_of, is_query_key_value
from .basis import resolve_basis
from .checks import check_is_lotr
from .config import LotrConfig
from .expert_names import map_names
from .experts import is_plain_stack, stacked_weights
from .names import check_names, check_rank_pattern, linear_paths, names_in_layers, suffixes

#: Query and value of the usual architectures: PEFT's own table for LoRA, and some that it lacks.
DEFAULT_TARGETS: dict[str, Any] = {
    "clip": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "llava": r".*language_model.*\.(q_proj|v_proj)",  # the vision tower has modules of these names too
    "modernbert": ["Wqkv"],
    "phi3": ["qkv_proj"],
    "vit": ["q_proj", "v_proj"],
    "whisper": ["q_proj", "v_proj"],
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}

#: Matches the experts of the usual models.
_EXPERTS = r".*\.experts\..*"


def plan(model: nn.Module, config: LotrConfig) -> Plan:
    """Compute which modules of a model would share what, without changing or even reading a weight.

    Args:
        model: Any model; also one on the meta device, so a 70B model needs no memory.
        config: The adapter's configuration; it is not changed.

    Returns:
        Groups, counts and shapes; `print` shows them as a table.

    Raises:
        ConfigError: The configuration contradicts its basis.
        CheckpointError: The basis cannot be read.
        PlanError: No module matches, a module cannot be adapted, or sites cannot share as the configuration asks.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> with torch.device("meta"):
        ...     model = BertModel(BertConfig())
        >>> plan(model, LotrConfig(r=8)).n_parameters
        26112
    """
    check_is_lotr(config)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model={str(model)[:80]!r} is no model. Load it first, or use `lotr plan` with its name."
        )
    return plan_adapter(model, copy.deepcopy(config))


def plan_adapter(model: nn.Module, config: LotrConfig, only: Collection[str] | None = None) -> Plan:
    """Return the plan of an adapter that is about to be made, and fill in what basis and model add to `config`.

    `only` are paths to adapt instead of what the configuration matches. Raises as `plan` does.
    """
    if config.basis is not None and config.basis_hash is None:  # one that was made has its structure already
        resolve_basis(config)
    if only is None:
        map_names(config, model)
    _resolve_names(config, model)
    if only is None:
        check_names(model, config)
    targets = _find_targets(model, config, only)
    if config.target_parameters:
        targets = _in_model_order(model, targets + _find_experts(model, config, only))
    if only is None and config.target_modules != DUMMY_TARGET_MODULES:
        if not targets:
            raise PlanError(_nothing_left(config))
        if config.basis is None:  # that of a basis may name more than is adapted
            check_rank_pattern(config.rank_pattern, [target.path for target in targets])
    # positions along the modes follow from the order, and another version of a model may name its modules in another
    order = {str(fields["path"]): n for n, fields in enumerate(config.targets or ())}
    if set(order) == {target.path for target in targets}:
        targets.sort(key=lambda target: order[target.path])
    return config.plan_for(targets)


def _resolve_names(config: LotrConfig, model: nn.Module) -> None:
    """Fill in `target_modules`: the default of the architecture, or the names behind "all-linear"."""
    if config.target_modules is None:
        model_type = str(BaseTuner.get_model_config(model).get("model_type"))
        default = DEFAULT_TARGETS.get(model_type)
        if default is None:
            raise ConfigError(
                f"target_modules is not set and the architecture {model_type!r} has no default. Please specify "
                f'`target_modules`, or use "all-linear". The linear modules of this model end in: '
                f"{', '.join(sorted({path.rpartition('.')[2] for path in linear_paths(model)})[:20])}."
            )
        if not isinstance(default, str):  # the table names modules of all variants of an architecture
            default = set(default) & suffixes(path for path, _ in model.named_modules())
        config.target_modules = default  # type: ignore[assignment]
    all_linear = config.target_modules == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if all_linear:  # not the copies of a head that other adapters train
        copies = tuple(
            f"{path}."
            for path, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        )
        own = {name for name in config.target_modules or () if not name.startswith(copies)}
        config.target_modules = own  # type: ignore[assignment]
    if all_linear and config.layers_to_transform is not None:
        config.target_modules = names_in_layers(config)  # type: ignore[assignment]


def _find_targets(model: nn.Module, config: LotrConfig, only: Collection[str] | None) -> list[Target]:
    """Return the modules that a configuration matches, or those of some paths, in model order."""
    if config.target_modules == DUMMY_TARGET_MODULES:
        return []

    def is_target(path: str) -> bool:
        if only is not None:
            return normalise(path) in only
        match = check_target_module_exists(config, path)
        return bool(match) and not isinstance(match, _ExcludedModule)

    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [
        _target(model, path, module, config)
        for path, module in model.named_modules()
        if path and not path.startswith(inside) and not is_basis(path) and is_target(path)
    ]


def is_basis(path: str) -> bool:
    """Whether a module's path lies in the shared factors."""
    return BASIS in path.split(".")


def _nothing_left(config: LotrConfig) -> str:
    """Return the message that what a configuration names is left out again."""
    named: Any = config.target_modules or config.target_parameters
    names = named if named is None or isinstance(named, str) else sorted(named)
    return (
        f"target_modules={names!r} match no module that exclude_modules={config.exclude_modules!r}, modules_to_save="
        f"{config.modules_to_save!r} and layers_to_transform={config.layers_to_transform!r} leave. Leave less out."
    )


def _target(model: nn.Module, path: str, module: nn.Module, config: LotrConfig) -> Target:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    check_adaptable(model, path, base)
    in_features, out_features = _get_in_out_features(base)
    shape = cast("tuple[int, int]", (out_features, in_features))
    clean = normalise(path)  # PEFT gives a compiled model's modules with or without the wrapper's name
    return Target(
        clean,
        shape,
        config.rank_of(clean),
        fused=fused_projections(model, path, shape) if config.modes else (),
        heads=heads_of(model, path, shape) if config.blocks.startswith("head") else None,
        attention=bool(config.modes) and is_query_key_value(path),
        bias=config.lora_bias and getattr(base, "bias", None) is not None,
    )


def _find_experts(model: nn.Module, config: LotrConfig, only: Collection[str] | None) -> list[Target]:
    """Return the parameters of experts that a configuration matches as `target_modules`, or those of some paths.

    Raises:
        PlanError: The experts are quantised or offloaded, or stand at the root of the model.
        ConfigError: The configuration asks for what experts do not have.
    """
    probe = copy.copy(config)
    probe.target_modules = config.target_parameters
    targets = []
    for path, (module_path, stack) in stacked_weights(model).items():
        match = check_target_module_exists(probe, path) if only is None else path in only
        if not match or isinstance(match, _ExcludedModule):
            continue
        if not module_path or not is_plain_stack(stack):
            raise PlanError(
                f"Target parameter {path!r} cannot be adapted: experts must be in a module of the model, in memory, "
                "and not quantised. Leave it out of target_parameters."
            )
        experts, *shape = stack.weight.shape
        out, width = reversed(shape) if stack.fan_in_fan_out else shape
        targets.append(Target(path, (experts * out, width), config.rank_of(path), experts=experts))
    asked = {"magnitude": (config.magnitude, "none"), "dropout": (config.dropout, 0.0)}
    for name, (value, needed) in asked.items():
        if targets and value != needed:
            raise ConfigError(
                f"{name}={value!r} is not supported on experts that one parameter holds, first {targets[0].path!r}. "
                f"Use {name}={needed!r}, or leave the experts out with exclude_modules={_EXPERTS!r}."
            )
    return targets


def _in_model_order(model: nn.Module, targets: list[Target]) -> list[Target]:
    """Return targets in the order of a model's parameters."""
    order = {
        normalise(path).replace(".base_layer", ""): n for n, (path, _) in enumerate(model.named_modules())
    }
    return sorted(
        # stacks of one module stay as they come, adapted or not
        targets,
        key=lambda target: order.get(target.path.rpartition(".")[0] if target.experts else target.path, 0),
    )
