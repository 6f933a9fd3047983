"""Experts that a model keeps in one parameter: what stands for such a weight, and the module around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import TrainingError
from ..math.stacked_weight import StackedWeight, StackUpdate
from ..math.update import FactoredUpdate, scaled
from ..sharing.keys import BASIS
from ..sharing.paths import normalise
from .weight import AdaptedWeight


class ExpertsWeight:
    """One parameter `(experts, out, in)` of an experts module, in the place of a linear module.

    Not a module itself, so the parameter stays where the model has it. With `fan_in_fan_out` it is stored
    `(experts, in, out)`.
    """

    bias = None

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.fan_in_fan_out = bool(getattr(module, "is_transposed", False))

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, in the layout of the model."""
        return self.module.get_parameter(self.name)

    @weight.setter
    def weight(self, weight: nn.Parameter) -> None:
        setattr(self.module, self.name, weight)


class LotrExperts(nn.Module):
    """An experts module whose parameters have updates; each child holds those of the parameter of its name.

    The module reads its parameters itself, so it runs with `W + ΔW` in their place: in factored form where the experts
    of the parameter share factors, else as a sum that every forward pass computes.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the experts with the active adapters.

        Raises:
            TrainingError: DeepSpeed has cut the parameters into parts.
        """
        parameters = self.base_layer.parameters(recurse=False)
        if torch.is_grad_enabled() and any(hasattr(parameter, "ds_id") for parameter in parameters):
            raise TrainingError(
                "Adapters on experts that one parameter holds cannot train under ZeRO-3, which takes factors away "
                "before the backward pass needs them. Use ZeRO-2 or FSDP2, or leave the experts out with "
                "exclude_modules."
            )
        weights = {name: _adapted(weight) for name, weight in self.adapted_weights()}
        changed = {name: W for name, W in weights.items() if W is not None}
        return (
            functional_call(self.base_layer, changed, args, kwargs)
            if changed
            else self.base_layer(*args, **kwargs)
        )

    def adapted_weights(self) -> Iterator[tuple[str, AdaptedWeight]]:
        """Yield name and updates of every adapted parameter."""
        for name, child in self.named_children():
            if isinstance(child, AdaptedWeight):
                yield name, child

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the plain experts; PEFT calls this where a tuner layer wraps more than one weight."""
        if merge:
            for _, weight in self.adapted_weights():
                weight.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def _adapted(weight: AdaptedWeight) -> Tensor | None:
    """Return `W + ΔW` in the layout of the model, or `None` where the parameter is used as it is."""
    if weight.disable_adapters:
        if weight.merged:
            weight.unmerge()
        return None
    active = [adapter for adapter in weight.active_adapters if adapter in weight.adapters]
    if weight.merged or not active:
        return None
    W: Any = weight.get_base_layer().weight
    updates = [update for adapter in active for update in weight.factored(adapter)]
    grids = {update.grid for update in updates}
    # a compiler and experts with factors of their own see the sum
    if grids == {(weight.experts, 1)} and not torch.compiler.is_compiling():
        return StackedWeight.of(W, [_stacked(weight, update) for update in updates])
    for adapter in active:
        W = weight.plus(W, weight.delta(adapter))
    return W


def _stacked(weight: AdaptedWeight, update: FactoredUpdate) -> StackUpdate:
    cores = scaled(update.C, update.scaling).unflatten(0, (weight.experts, -1))
    return StackUpdate(update.U, cores, update.V.T, weight.fan_in_fan_out)


def stacked_weights(model: nn.Module) -> dict[str, tuple[str, ExpertsWeight]]:
    """Return the three-dimensional parameters of a model, adapted or not.

    Returns:
        Path of the parameter, without wrappers' names → path of its module in the model, and the parameter.
    """
    weights, inside = {}, set()
    for path, module in model.named_modules():
        base: Any = module
        if isinstance(module, LotrExperts):
            base = module.base_layer
            inside.add(base)
        elif module in inside or BASIS in path.split("."):
            continue
        for name, parameter in base.named_parameters(recurse=False):
            if parameter.dim() == 3:
                weights[normalise(f"{path}.{name}")] = (path, ExpertsWeight(base, name))
    return weights


def is_plain_stack(weight: ExpertsWeight) -> bool:
    """Whether a stack of experts holds ordinary numbers in memory, or on the meta device of a plan."""
    parameter = weight.weight
    offloaded = parameter.is_meta and hasattr(weight.module, "_hf_hook")
    plain = parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return plain and not offloaded
