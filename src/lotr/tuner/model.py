"""The tuner: an adapted model in PEFT's life cycle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from ..errors import ConfigError
from ..math.magnitude import MAGNITUDES
from ..sharing.keys import BASIS, PREFIX, file_key, without_adapter
from ..sharing.paths import normalise
from ..sharing.plan import Plan
from . import add_weighted as combine
from . import mixed_batch as mixed
from . import state_dict as state
from .checkpointing import check_checkpointing
from .config import LotrConfig
from .group import LotrGroup, LotrLayer
from .injection import Injection, bases, uncompiled
from .layer import LotrLinear
from .learning_rate import watch_rates
from .lora_words import check_combination_words
from .saved_adapter import read_basis, used_by
from .targets import DEFAULT_TARGETS, is_basis


class Tasks(Protocol):
    """Tasks of a bank, of which each row of a batch can use another."""

    def select(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use a task in each row of the batches that run inside."""

    def leave(self, model: nn.Module) -> None:
        """Take out of a model whatever the bank put into it."""


class LotrModel(BaseTuner):
    """A model with LoTR adapters. Use `get_peft_model(model, LotrConfig(...))` to make one."""

    prefix = PREFIX
    tuner_layer_cls = LotrLayer
    target_module_mapping = DEFAULT_TARGETS
    tasks: Tasks | None = None  # of a bank, see `CoreBank.wrap`
    _inner_names: frozenset[str] = frozenset()  # of the numbers inside the adapters of this model
    _asked: tuple[str, set[str] | None, bool]  # by the caller of `inject_adapter`: name, paths, whether empty
    _injection: Injection | None = None

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
        self._asked = adapter_name, paths, low_cpu_mem_usage
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            watch_rates(model, adapter_name, cast("LotrConfig", self.peft_config[adapter_name]))
        finally:
            self._injection = None

    def _prepare_adapter_config(self, peft_config: LotrConfig, model_config: dict[str, Any]) -> LotrConfig:  # type: ignore[override]
        return peft_config  # the targets are resolved with the model at hand, in `_prepare_model`

    def _prepare_model(self, peft_config: LotrConfig, model: nn.Module) -> None:  # type: ignore[override]
        active = list(self.active_adapters)
        injection = Injection(model, peft_config, *self._asked, active, self._check_names)
        self.peft_config[injection.adapter] = injection.config
        injection.begin()
        self._injection = injection

    def _check_names(self, plan: Plan) -> None:
        """Refuse an adapter that is called like a number inside an adapter: PEFT would take one for the other."""
        layers = (*LotrGroup.adapter_layer_names, *LotrLinear.adapter_layer_names)
        inner = {"weight", *layers, *MAGNITUDES[plan.magnitude].shapes(1, 1)}
        for parts in plan.parts.values():
            for part in parts:
                inner |= {part.name, *part.group.core.shapes, *part.group.biases}
        self._inner_names |= inner
        taken = sorted(self._inner_names.intersection(self.peft_config))
        if taken:
            raise ConfigError(
                f"An adapter cannot be called {taken[0]!r}: numbers inside an adapter have that name, and PEFT would "
                "leave them out of the file. Choose another adapter_name."
            )

    def _check_target_module_exists(self, peft_config: LotrConfig, key: str) -> Any:  # type: ignore[override]
        if self._injection is not None and self._asked[1] is None:
            if key in self._injection.targets:
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
        layer = cast("Injection", self._injection).adapt(current_key, target, **get_quantization_kwargs(self))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(  # type: ignore[override]
        self, peft_config: LotrConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # PEFT's own way knows the wrapper of its LoRA alone
        return cast("Injection", self._injection).adapt_experts()

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in the place of another; layers keep what they wrap, and place their numbers."""
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the groups that no adapter has any more."""
        super().delete_adapter(adapter_name)
        for basis in bases(self.model):
            for name in [name for name, group in basis.items() if not group.lotr_U]:
                del basis[name]

    def _check_merge_allowed(self) -> None:
        """Allow tied weights, of which PEFT warns: a merged weight is a new one, and its twin stays as it is."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        uncompiled(model)._modules.pop(BASIS, None)
        if self.tasks is not None:
            self.tasks.leave(model)
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
