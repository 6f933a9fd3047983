"""The tuner: executes a plan on a model, inside PEFT's life cycle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from ..errors import ConfigError
from ..math.magnitude import MAGNITUDES
from ..sharing.groups import Group
from ..sharing.keys import BASIS, PREFIX, file_key, group_keys, without_adapter
from ..sharing.paths import normalise
from ..sharing.plan import Plan
from . import add_weighted as combine
from . import mixed_batch as mixed
from . import state_dict as state
from .basis import check_basis
from .checkpointing import check_checkpointing
from .config import LotrConfig
from .experts import ExpertsWeight, LotrExperts, stacked_weights
from .group import LotrGroup, LotrLayer
from .group_init import start_group
from .layer import LotrLinear
from .learning_rate import watch_rates
from .lora_words import check_combination_words
from .quantised import keep_layout
from .saved_adapter import hash_of, read_basis, used_by
from .targets import DEFAULT_TARGETS, is_basis, plan_adapter
from .weight import AdaptedWeight


@dataclass
class _Injection:
    """What one call of `inject_adapter` carries to the hooks that PEFT calls in it."""

    adapter: str
    paths: set[str] | None  # of a state dict that says what to adapt
    empty: bool  # whether the numbers are loaded afterwards
    plan: Plan = field(init=False)
    modules: dict[str, nn.Module | ExpertsWeight] = field(init=False)  # by path, before any is replaced
    keys: set[str] = field(init=False)  # of the targets, with the names of wrappers
    basis_factors: dict[str, Tensor] = field(init=False)  # of another adapter, by key
    cores: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of each group, as they start
    basis: nn.ModuleDict | None = None  # the one place of the groups, where the model has it already
    scaling: dict[str, float] = field(default_factory=dict)  # one for the whole model, see `LotrGroup`


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

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to a model. Every check runs before the model is touched."""
        paths = None
        if state_dict is not None:
            paths = {normalise(key.rsplit(f".{PREFIX}", 1)[0]) for key in state_dict}
        self._injection = _Injection(adapter_name, paths, low_cpu_mem_usage)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            watch_rates(model, adapter_name, cast("LotrConfig", self.peft_config[adapter_name]))
        finally:
            self._injection = None

    def _prepare_adapter_config(self, peft_config: LotrConfig, model_config: dict[str, Any]) -> LotrConfig:  # type: ignore[override]
        return peft_config  # the targets are resolved with the model at hand, in `_prepare_model`

    def _prepare_model(self, peft_config: LotrConfig, model: nn.Module) -> None:  # type: ignore[override]
        injection = cast("_Injection", self._injection)
        plan = injection.plan = plan_adapter(model, peft_config, injection.paths)
        self._check_names(plan)
        injection.basis_factors = {}
        if peft_config.basis is not None:
            injection.basis_factors = read_basis(peft_config)
            check_basis(plan, injection.basis_factors, peft_config.basis)
            peft_config.basis_hash = hash_of(injection.basis_factors)
        keep_layout(model)
        if peft_config.targets is None:
            peft_config.warn_of_random_factors()
            if plan.cut_ranks:
                warnings.warn(plan.cut_ranks, stacklevel=2)
        targets = [target.to_dict() for target in plan.targets]
        if peft_config.targets not in (None, targets):  # the object describes an adapter of another model
            self.peft_config[injection.adapter] = peft_config = copy.copy(peft_config)
        peft_config.targets = targets
        paths = {key: normalise(key) for key, _ in model.named_modules()}
        linear = {target.path for target in plan.targets if not target.experts}
        injection.keys = {key for key, path in paths.items() if path in linear}
        experts = {path: weight for path, (_, weight) in stacked_weights(model).items()}
        injection.modules = experts | {paths[key]: module for key, module in model.named_modules()}
        injection.basis = next(_bases(model), None)
        for layer in model.modules():
            if isinstance(layer, LotrLayer):
                injection.scaling = layer.scaling
                layer.drop(injection.adapter)  # an adapter made anew takes the place of the one of its name

    def _check_names(self, plan: Plan) -> None:
        """Refuse an adapter that is called like a number inside an adapter: PEFT would take one for the other."""
        layers = (*LotrGroup.adapter_layer_names, *LotrLinear.adapter_layer_names)
        inner = {"weight", *layers, *MAGNITUDES[plan.magnitude].shapes(1, 1)}
        for parts in plan.parts.values():
            for part in parts:
                inner |= {part.name, *part.group.core.shapes}
        self._inner_names |= inner
        taken = sorted(self._inner_names.intersection(self.peft_config))
        if taken:
            raise ConfigError(
                f"An adapter cannot be called {taken[0]!r}: numbers inside an adapter have that name, and PEFT would "
                "leave them out of the file. Choose another adapter_name."
            )

    def _check_target_module_exists(self, peft_config: LotrConfig, key: str) -> Any:  # type: ignore[override]
        if self._injection is not None and self._injection.paths is None:
            if key in self._injection.keys:
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
        injection = cast("_Injection", self._injection)
        path = normalise(current_key)
        if not isinstance(target, LotrLinear):
            shape = injection.plan.shape_of[path]
            layer = LotrLinear(target, shape, injection.scaling, **get_quantization_kwargs(self))
            layer._active_adapter = list(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        self._add(path, target, peft_config)

    def _inject_parameters(  # type: ignore[override]
        self, peft_config: LotrConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Add the adapter to experts that one parameter holds; PEFT's own way knows the wrapper of its LoRA alone."""
        injection = cast("_Injection", self._injection)
        weights, paths = stacked_weights(model), []
        for target in injection.plan.targets:
            if not target.experts:
                continue
            module_path, stack = weights[target.path]
            experts = model.get_submodule(module_path)
            if not isinstance(experts, LotrExperts):
                parent, _, name = module_path.rpartition(".")
                experts = LotrExperts(experts)
                setattr(model.get_submodule(parent), name, experts)
            if stack.name not in experts._modules:
                layer = AdaptedWeight(stack, target.shape, injection.scaling, target.experts)
                layer._active_adapter = list(self.active_adapters)
                experts.add_module(stack.name, layer)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._add(target.path, experts.get_submodule(stack.name), peft_config)
            paths.append(target.path)
        return paths

    def _add(self, path: str, target: Any, peft_config: LotrConfig) -> None:
        """Add the adapter to an adapted weight, and its groups to the basis."""
        injection = cast("_Injection", self._injection)
        members, cores = [], {}
        for part in injection.plan.parts[path]:
            group, core = part.group, part.group.core
            members.append((part, self._shared(group, peft_config, target)))
            if core.by_site:
                numbers = core.block(injection.cores[group.name], part.region)
                cores[part.name] = part.lay(numbers)
        target.add(injection.adapter, members, cores, peft_config, injection.empty)
        target.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in the place of another; layers keep what they wrap, and place their numbers."""
        setattr(parent, child_name, new_module)

    def _shared(self, group: Group, config: LotrConfig, member: AdaptedWeight) -> LotrGroup:
        """Return the module with the group's numbers, made when its first member comes."""
        injection = cast("_Injection", self._injection)
        adapter = injection.adapter
        if injection.basis is None:
            injection.basis = self._new_basis(member)
        if group.name not in injection.basis:
            injection.basis[group.name] = LotrGroup(group.shape, injection.scaling)
            injection.basis[group.name]._active_adapter = list(self.active_adapters)  # type: ignore[assignment]
        shared = cast("LotrGroup", injection.basis[group.name])
        if adapter not in shared.lotr_U:
            U, V, core = start_group(group, config, injection.modules, adapter, injection.empty)
            injection.cores[group.name] = core
            if injection.basis_factors:
                keys, factors = group_keys(group), injection.basis_factors
                U, V = factors[keys["U"]], factors[keys["V"]].T
                core |= {name: factors[keys[name]] for name in group.core.of_basis}
            device, dtype = member.device_and_dtype()
            own = {} if group.core.by_site else core
            of_basis, frozen = group.core.of_basis, config.trainable == "cores"
            shared.add(adapter, U, V, own, of_basis, frozen, device, dtype)
            shared.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        return shared

    def _new_basis(self, member: AdaptedWeight) -> nn.ModuleDict:
        """Return the one registered place of the shared factors, on the root of the base model."""
        # the root of a container is a list of layers to call; there the first adapted layer is the place
        root = _uncompiled(self.model)
        container = isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        basis = nn.ModuleDict()
        (member if container else root).add_module(BASIS, basis)
        return basis

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the groups that no adapter has any more."""
        super().delete_adapter(adapter_name)
        for basis in _bases(self.model):
            for name in [name for name, group in basis.items() if not group.lotr_U]:
                del basis[name]

    def _check_merge_allowed(self) -> None:
        """Allow tied weights, of which PEFT warns: a merged weight is a new one, and its twin stays as it is."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        _uncompiled(model)._modules.pop(BASIS, None)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        check_checkpointing(self.model)
        names = kwargs.get("adapter_names")
        rows: AbstractContextManager[None]
        if names is not None and self.tasks is not None:  # names of a bank's tasks, in training too
            rows = self.tasks.select(names)
        else:
            rows = mixed.forward_hooks(self, names, kwargs.get("num_beams"))
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
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **words: Any,
    ) -> None:
        """Add the adapter whose update is `Σ weight · update`, exactly. See `combine.add_weighted`."""
        check_combination_words(words)
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
        own = state.of_adapter(model, adapter_name, state_dict, factors=not config.refers_to_basis)
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
        return state.to_load(model, adapter_name, state_dict)


def _bases(model: nn.Module) -> Iterator[nn.ModuleDict]:
    """Yield the places of shared factors."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == BASIS:
            yield cast("nn.ModuleDict", module)


def _uncompiled(model: nn.Module) -> nn.Module:
    # a compiled model looks up attributes in the module it wraps, so what is added must be added there
    return getattr(model, "_orig_mod", model)
