"""An adapter is added to a model: PEFT walks the modules, and this puts the numbers of the plan into them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..sharing.groups import Group
from ..sharing.keys import BASIS, group_keys
from ..sharing.paths import normalise
from ..sharing.plan import Plan
from .basis import check_basis
from .config import LotrConfig
from .experts import ExpertsWeight, LotrExperts, stacked_weights
from .group import LotrGroup, LotrLayer
from .group_init import start_group
from .layer import LotrLinear
from .quantised import check_layout, keep_layout
from .saved_adapter import hash_of, read_basis
from .targets import plan_adapter
from .weight import AdaptedWeight


class Injection:
    """One call of `inject_adapter`. Every check runs before the model is touched.

    Args:
        model: The base model, with whatever adapters it has.
        config: Configuration of the new one, in which basis and model fill in what is open.
        adapter: Its name.
        paths: Of a state dict that says what to adapt, instead of the configuration.
        empty: Whether the numbers are loaded afterwards.
        active: Names of the adapters in use.
        check: Refuses a plan, before anything is recorded.

    Raises:
        ConfigError, CheckpointError, PlanError: See `lotr.plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LotrConfig,
        adapter: str,
        paths: set[str] | None,
        empty: bool,
        active: list[str],
        check: Callable[[Plan], None],
    ) -> None:
        self.model, self.adapter, self.empty, self.active = model, adapter, empty, active
        self.plan = plan_adapter(model, config, paths)
        check(self.plan)
        check_layout(model)
        self._factors: dict[str, Tensor] = {}  # of a basis, by key
        if config.basis is not None:
            self._factors = read_basis(config)
            check_basis(self.plan, self._factors, config.basis)
            config.basis_hash = hash_of(self._factors)
        if config.targets is None:
            config.warn_of_random_factors()
            if self.plan.cut_ranks:
                warnings.warn(self.plan.cut_ranks, stacklevel=2)
        targets = [target.to_dict() for target in self.plan.targets]
        # an object that describes an adapter of another model stays as it is
        self.config = config if config.targets in (None, targets) else copy.copy(config)
        self.config.targets = targets
        modules = dict(model.named_modules())
        linear = {target.path for target in self.plan.targets if not target.experts}
        #: Linear modules to adapt, with the names of wrappers → without.
        self.targets = {key: path for key in modules if (path := normalise(key)) in linear}
        # by path, before any is replaced
        self._modules: dict[str, nn.Module | ExpertsWeight] = {
            path: weight for path, (_, weight) in stacked_weights(model).items()
        }
        self._modules |= {normalise(key): module for key, module in modules.items()}
        self._cores: dict[str, dict[str, Tensor]] = {}  # of each group, as they start
        self._basis = next(bases(model), None)
        self._scaling: dict[str, float] = {}  # one for the whole model, see `LotrGroup`

    def begin(self) -> None:
        """Take away an adapter of the name that is there; the new one takes its place."""
        keep_layout(self.model)
        for layer in self.model.modules():
            if isinstance(layer, LotrLayer):
                self._scaling = layer.scaling
                layer.drop(self.adapter)

    def adapt(self, key: str, module: nn.Module, **quantization: Any) -> LotrLinear:
        """Add the adapter to a linear module, and return the module that adapts it."""
        # PEFT takes a compiler's name off where a file says the paths
        path = self.targets.get(key) or normalise(key)
        if not isinstance(module, LotrLinear):
            module = LotrLinear(module, self.plan.shape_of[path], self._scaling, **quantization)
            module._active_adapter = list(self.active)
        self._add(path, module)
        return module

    def adapt_experts(self) -> list[str]:
        """Add the adapter to experts that one parameter holds, and return their paths."""
        weights, paths = stacked_weights(self.model), []
        for target in self.plan.targets:
            if not target.experts:
                continue
            module_path, stack = weights[target.path]
            experts = self.model.get_submodule(module_path)
            if not isinstance(experts, LotrExperts):
                parent, _, name = module_path.rpartition(".")
                experts = LotrExperts(experts)
                setattr(self.model.get_submodule(parent), name, experts)
            if stack.name not in experts._modules:
                layer = AdaptedWeight(stack, target.shape, self._scaling, target.experts)
                layer._active_adapter = list(self.active)
                experts.add_module(stack.name, layer)
            with init_empty_weights() if self.empty else nullcontext():
                self._add(target.path, experts.get_submodule(stack.name))
            paths.append(target.path)
        return paths

    def _add(self, path: str, weight: Any) -> None:
        """Add the adapter to an adapted weight, and its groups to the basis."""
        members, cores = [], {}
        for part in self.plan.parts[path]:
            members.append((part, self._shared(part.group, weight)))
            if part.group.core.by_site:
                numbers = part.group.core.block(self._cores[part.group.name], part.region)
                cores[part.name] = part.lay(numbers)
        weight.add(self.adapter, members, cores, self.config, self.empty)
        weight.set_adapter(self.active, inference_mode=self.config.inference_mode)

    def _shared(self, group: Group, member: AdaptedWeight) -> LotrGroup:
        """Return the module with the group's numbers, made when its first member comes."""
        if self._basis is None:
            self._basis = _new_basis(self.model, member)
        if group.name not in self._basis:
            self._basis[group.name] = LotrGroup(group.shape, self._scaling)
            self._basis[group.name]._active_adapter = list(self.active)  # type: ignore[assignment]
        shared = cast("LotrGroup", self._basis[group.name])
        if self.adapter not in shared.lotr_U:
            U, V, core = start_group(group, self.config, self._modules, self.adapter, self.empty)
            self._cores[group.name] = core
            if self._factors:
                keys = group_keys(group)
                U, V = self._factors[keys["U"]], self._factors[keys["V"]].T
                core |= {name: self._factors[keys[name]] for name in group.core.of_basis}
            device, dtype = member.device_and_dtype()
            own = {} if group.core.by_site else core
            own |= {name: torch.zeros(shape) for name, shape in group.biases.items()}
            frozen = self.config.trainable == "cores"
            shared.add(self.adapter, U, V, own, group.core.of_basis, frozen, device, dtype)
            shared.set_adapter(self.active, inference_mode=self.config.inference_mode)
        return shared


def _new_basis(model: nn.Module, member: AdaptedWeight) -> nn.ModuleDict:
    """Return the one registered place of the shared factors, on the root of the base model."""
    # the root of a container is a list of layers to call; there the first adapted layer is the place
    root = uncompiled(model)
    container = isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    basis = nn.ModuleDict()
    (member if container else root).add_module(BASIS, basis)
    return basis


def bases(model: nn.Module) -> Iterator[nn.ModuleDict]:
    """Yield the places of shared factors."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == BASIS:
            yield cast("nn.ModuleDict", module)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that a compiled model wraps; what is added to the wrapper is not found there."""
    return getattr(model, "_orig_mod", model)
