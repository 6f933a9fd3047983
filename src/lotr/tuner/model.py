"""The tuner: executes a plan on a model, inside PEFT's life cycle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from ..errors import ConfigError
from ..math import update as delta
from ..sharing.keys import BASIS, PREFIX, file_key, without_adapter
from ..sharing.paths import normalise
from ..sharing.plan import Group, Plan
from . import add_weighted as combine
from . import mixed_batch as mixed
from . import state_dict as state
from .basis import check_basis, factors_in
from .config import LotrConfig
from .group import LotrGroup, LotrLayer
from .group_init import start_group
from .layer import LotrLinear
from .saved_adapter import hash_of, read_basis, used_by
from .targets import DEFAULT_TARGETS, is_basis, plan_adapter
from .weight import base_weight


@dataclass
class _Injection:
    """What one call of `inject_adapter` carries to the hooks that PEFT calls in it."""

    plan: Plan
    basis_factors: dict[str, Tensor]  # of another adapter, by key
    modules: dict[str, nn.Module]  # by path, before any is replaced
    cores: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of each group, as they start
    basis: nn.ModuleDict | None = None  # found once: looking for it means walking the whole model


class Tasks(Protocol):
    """Tasks of a bank, of which each row of a batch can use another."""

    def select(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use a task in each row of the batches that run inside."""


class LotrModel(BaseTuner):
    """A model with LoTR adapters. Use `get_peft_model(model, LotrConfig(...))` to make one."""

    prefix = PREFIX
    tuner_layer_cls = LotrLayer
    target_module_mapping = DEFAULT_TARGETS
    tasks: Tasks | None = None  # of a bank, see `CoreBank.wrap`
    _inner_names: frozenset[str] = frozenset()  # of the numbers inside the adapters of this model
    _injection: _Injection | None = None

    # ------------------------------------------------------------------ injection: plan, then apply

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to a model. Every check runs before the model is touched."""
        self._paths, self._is_empty = None, low_cpu_mem_usage
        if state_dict is not None:
            self._paths = {normalise(key.rsplit(f".{PREFIX}", 1)[0]) for key in state_dict}
        self._adapter = adapter_name
        groups = (module for module in model.modules() if isinstance(module, LotrGroup))
        known = next(groups, None)
        self._scaling = {} if known is None else known.scaling
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        finally:
            self._injection = None

    def _prepare_adapter_config(self, peft_config: LotrConfig, model_config: dict[str, Any]) -> LotrConfig:  # type: ignore[override]
        return peft_config  # the targets are resolved with the model at hand, in `_prepare_model`

    def _prepare_model(self, peft_config: LotrConfig, model: nn.Module) -> None:  # type: ignore[override]
        is_new = peft_config.targets is None
        plan = plan_adapter(model, peft_config, self._paths)
        self._inner_names = self._inner_names | state.inner_names(plan)
        state.check_names([*self.peft_config, self._adapter], self._inner_names)
        factors: dict[str, Tensor] = {}
        if peft_config.basis is not None:
            factors = read_basis(peft_config)
            check_basis(plan, factors, peft_config.basis)
            peft_config.basis_hash = hash_of(factors)
        if is_new:
            peft_config.warn_of_random_factors()
            if plan.cut_ranks:
                warnings.warn(plan.cut_ranks, stacklevel=2)
        targets = [target.to_dict() for target in plan.targets]
        if peft_config.targets not in (
            None,
            targets,
        ):  # the object describes an adapter of another model already
            self.peft_config[self._adapter] = peft_config = copy.copy(peft_config)
        peft_config.targets = targets
        modules = {normalise(path): module for path, module in model.named_modules()}
        for layer in modules.values():  # an adapter that is made anew takes the place of the one of its name
            if isinstance(layer, LotrLayer):
                layer.drop(self._adapter)
        self._injection = _Injection(plan, factors, modules)

    def _check_target_module_exists(self, peft_config: LotrConfig, key: str) -> Any:  # type: ignore[override]
        if self._injection is not None and self._paths is None:
            if normalise(key) in self._injection.plan.shape_of:
                return True
            if not peft_config.exclude_modules:
                return False
        # PEFT tells what was excluded, and compares a state dict with what the configuration would match
        return False if is_basis(key) else BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: LotrConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        injection = self._running
        path = normalise(current_key)
        if not isinstance(target, LotrLinear):
            shape = injection.plan.shape_of[path]
            layer = LotrLinear(target, shape, self._scaling, **get_quantization_kwargs(self))
            layer._active_adapter = list(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        parts = injection.plan.parts[path]
        members = [(part, self._shared(part.group, adapter_name, peft_config, target)) for part in parts]
        cores = {
            part.name: delta.side_by_side(
                part.group.core.block(injection.cores[part.group.name], part.region), part.grid
            )
            for part in parts
            if part.group.core.by_site
        }
        target.add(adapter_name, members, cores, peft_config, self._is_empty)
        target.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    @property
    def _running(self) -> _Injection:
        if self._injection is None:
            raise RuntimeError("Modules are replaced by inject_adapter alone.")
        return self._injection

    def _shared(self, group: Group, adapter: str, config: LotrConfig, member: LotrLinear) -> LotrGroup:
        """Return the module with the group's numbers, made when its first member comes."""
        injection = self._running
        if injection.basis is None:
            injection.basis = self._basis(member)
        basis: Any = injection.basis
        if group.name not in basis:
            basis[group.name] = LotrGroup(group.shape, self._scaling)
            basis[group.name]._active_adapter = list(self.active_adapters)
        shared: LotrGroup = basis[group.name]
        if adapter not in shared.lotr_U:
            seed = torch.initial_seed() if config.seed is None else config.seed
            U, V, core = start_group(group, config, self._weights_of, adapter, seed, self._is_empty)
            injection.cores[group.name] = core
            if injection.basis_factors:
                U, V = factors_in(group, injection.basis_factors)
            shared.add(adapter, U, V, {} if group.core.by_site else core, frozen=config.trainable == "cores")
            device, dtype = member._get_base_layer_device_and_dtype(member.get_base_layer())
            shared.move_adapter(adapter, device, dtype)
            shared.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        return shared

    def _weights_of(self, group: Group) -> list[Tensor]:
        """Return the blocks of the base weights that share a group's factors, `(o, i)` each."""
        modules = self._running.modules
        weights = {site.module: base_weight(modules[site.module]) for site in group.sites}
        return [
            weights[site.module][site.row :, site.column :][: site.shape[0], : site.shape[1]]
            for site in group.sites
        ]

    def _basis(self, member: LotrLinear) -> nn.ModuleDict:
        """Return the one registered place of the shared factors, on the root of the base model."""
        for path, module in self.model.named_modules():
            if path.rpartition(".")[2] == BASIS:
                return module
        # the root of a container is a list of layers to call; there the first adapted layer is the place
        root = _uncompiled(self.model)
        container = isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        home = member if container else root
        home.add_module(BASIS, nn.ModuleDict())
        return getattr(home, BASIS)

    # ------------------------------------------------------------------ removal

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the groups that no adapter has any more."""
        super().delete_adapter(adapter_name)
        for path, module in self.model.named_modules():
            if path.rpartition(".")[2] == BASIS:
                for name in [name for name, group in module.items() if not group.lotr_U]:
                    del module[name]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        _uncompiled(model)._modules.pop(BASIS, None)
        return model

    # ------------------------------------------------------------------ mixed batches, combinations, files

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        rows: AbstractContextManager[None]
        if names is not None and self.tasks is not None:  # names of a bank's tasks, in training too
            rows = self.tasks.select(names)
        else:
            rows = mixed.forward_hooks(self, names, beams)
        with rows:
            yield

    def select(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use a task of a bank in each row of the batches that run inside; see `CoreBank.wrap`.

        Raises:
            ConfigError: There is no bank on the model, or the tasks do not fit into its memory.
            CheckpointError: A task does not exist or is damaged.
        """
        if self.tasks is None:
            raise ConfigError(
                "This model has adapters and no bank. Put a bank on its base model with bank.wrap."
            )
        return self.tasks.select(names)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the adapter whose update is `Σ weight · update`, exactly. See `combine.add_weighted`."""
        combine.add_weighted(self, adapters, weights, adapter_name, combination_type)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: LotrConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own = state.select(model, state_dict, factors=not config.refers_to_basis)
        return own | cls._get_learnable_bias_state_dict(model, state_dict, config)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        bare = without_adapter(key, adapter_name)
        return file_key(bare if bare != key else super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: LotrConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config.refers_to_basis:
            state_dict = state_dict | used_by(config.recorded_plan(), read_basis(config))
        state_dict = state.match_groups(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state.check_complete(model, adapter_name, remapped)
        return remapped


def _uncompiled(model: nn.Module) -> nn.Module:
    # a compiled model looks up attributes in the module it wraps, so what is added must be added there
    return getattr(model, "_orig_mod", model)
