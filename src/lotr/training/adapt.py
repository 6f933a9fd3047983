"""From settings to a model with an adapter of any method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..cores import CORES
from ..errors import ConfigError, near
from ..methods import METHODS
from ..sites import check_modes
from .budget import AUTO, check_budget_is_meant
from .optimizer import Rates, default_rates
from .parsing import read_core_ranks, read_modes, read_rank, target_modules

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from lotr_cli.settings import TrainSettings

    from ..tuner.config import LotrConfig

#: Methods that are not rows of the table: PEFT's own for comparison, and a new head alone.
PEERS = ("peft_lora", "peft_dora", "head")
TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def adapter_config(settings: TrainSettings, task: str) -> PeftConfig:
    """Return the PEFT configuration that the settings ask for.

    Raises:
        ConfigError: A setting has no meaning; the message names it.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from ..tuner.config import LotrConfig

    _check_meaning(settings, task)
    common: dict[str, Any] = {
        "task_type": TASK_TYPES[task],
        "target_modules": target_modules(settings.target),
    }
    if settings.method == "head":
        if task == "causal-lm":
            raise ConfigError(
                "method='head' trains a new head alone, and causal-lm has none. Use another method."
            )
        return LotrConfig(**{**common, "target_modules": DUMMY_TARGET_MODULES})
    if settings.method in PEERS:
        k, r = read_rank(settings.rank)
        if k != r:
            raise ConfigError(f"rank={settings.rank!r} is a pair, and LoRA has one rank. Use one number.")
        return peft.LoraConfig(
            r=r,
            lora_alpha=settings.scaling * r,
            lora_dropout=settings.dropout,
            use_dora=settings.method == "peft_dora",
            **common,
        )
    if settings.basis is not None:
        return _on_basis(settings, TASK_TYPES[task])
    if settings.method not in METHODS:
        raise ConfigError(
            f"method={settings.method!r} is not known. {near(settings.method, [*METHODS, *PEERS])} "
            "`lotr methods` describes them."
        )
    return LotrConfig(
        r=1 if settings.rank == AUTO else read_rank(settings.rank),  # the model decides: `budget.fit`
        method=settings.method,
        modes=read_modes(settings.modes),
        core=settings.core,
        core_ranks=read_core_ranks(settings.core_ranks),
        blocks=settings.blocks,
        magnitude=settings.magnitude,
        train=settings.trainable,
        scaling=settings.scaling,
        start=settings.start,
        dropout=settings.dropout,
        seed=settings.seed,
        **common,
    )


#: Settings of this library's methods, which PEFT's own do not know.
_OURS = ("modes", "core", "core_ranks", "blocks", "magnitude", "trainable", "start", "basis", "budget")


def _check_meaning(settings: TrainSettings, task: str) -> None:
    """Refuse settings that would be passed over."""
    check_budget_is_meant(settings)
    if settings.method in PEERS:
        given = [name for name in _OURS if getattr(settings, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]}={getattr(settings, given[0])!r} has no meaning with method={settings.method!r}, which is "
                "not a row of the table. Leave it out, or name a row (`lotr methods`)."
            )
    if settings.head_warmup and task == "causal-lm":
        raise ConfigError(
            f"head_warmup={settings.head_warmup} has no meaning for causal-lm, where no head is new. Leave it out."
        )


def _on_basis(settings: TrainSettings, task_type: str) -> PeftConfig:
    """Return a configuration with the structure of an adapter, whose factors are kept."""
    from ..tuner.config import LotrConfig

    of = _basis(settings)
    _check_basis(settings, of)
    same = (
        "r",
        "method",
        "modes",
        "core",
        "core_ranks",
        "blocks",
        "scaling",
        "target_modules",
        "exclude_modules",
    )
    same = (*same, "layers_to_transform", "layers_pattern", "rank_pattern")
    return LotrConfig(
        basis=settings.basis,
        task_type=task_type,
        magnitude=settings.magnitude or of.magnitude,
        dropout=settings.dropout,
        seed=settings.seed,
        **{name: getattr(of, name) for name in same},
    )


def _check_basis(settings: TrainSettings, of: LotrConfig) -> None:
    """Refuse settings that contradict a basis, and record what is taken from it.

    Raises:
        ConfigError: The basis has no cores, or a setting asks for another structure.
    """
    if CORES[str(of.core)].is_identity:
        raise ConfigError(
            f"basis={settings.basis!r} has core={of.core!r}, which has no cores to train, so it cannot be a basis. "
            "Name an adapter with cores, for example of method lotr."
        )
    asked = {
        "method": None if settings.method == type(settings).method else settings.method,
        "rank": None if settings.rank == type(settings).rank else read_rank(settings.rank),
        "modes": None if settings.modes is None else check_modes(read_modes(settings.modes) or ()),
        "core": settings.core,
        "blocks": settings.blocks,
    }
    has = {"method": of.method, "rank": of.rank, "modes": of.modes, "core": of.core, "blocks": of.blocks}
    for name, value in asked.items():
        if value is not None and value != has[name]:
            raise ConfigError(
                f"{name}={getattr(settings, name)!r} contradicts basis={settings.basis!r}, which has "
                f"{name}={has[name]!r}. An adapter has the structure of its basis; leave it out."
            )
    if settings.trainable == "all":
        raise ConfigError("trainable='all' contradicts basis, whose factors are kept. Leave one of them out.")
    settings.method = of.method  # what the report says is what was trained
    settings.rank = ",".join(map(str, dict.fromkeys(of.rank)))


def _basis(settings: TrainSettings) -> LotrConfig:
    """Return the configuration of the adapter whose factors are kept."""
    from ..checkpoint import read_adapter
    from ..inspection import config_of

    return config_of(read_adapter(str(settings.basis)))


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a base model.

    Raises:
        ConfigError: A named target module matches nothing, or PEFT refuses the configuration.
    """
    from peft import get_peft_model

    check_targets(model, config)
    try:
        return full_precision_head(get_peft_model(model, config))
    except ValueError as error:
        if isinstance(error, ConfigError) or not type(error).__module__.startswith(("builtins", "peft")):
            raise
        raise ConfigError(str(error)) from error


def full_precision_head(model: PeftModel) -> PeftModel:
    """Keep modules that are trained in full in float32 on a half-precision base, as the factors are.

    In float16 the optimiser's smallest constants are zero, and the head is NaN after one step.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and next(module.parameters()).dtype in (
            torch.float16,
            torch.bfloat16,
        ):
            module.float()
            module.register_forward_pre_hook(cast)
    return model


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Refuse names in `target_modules` that match no module; PEFT passes over them in silence."""
    from ..tuner.targets import linear_paths

    names = getattr(config, "target_modules", None)
    if not isinstance(names, set | list | tuple):
        return
    paths = linear_paths(model)
    for name in sorted(names):
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            known = {path.rpartition(".")[2] for path in paths}
            raise ConfigError(f"target={name!r} matches no linear module of the model. {near(name, known)}")


def rates(settings: TrainSettings) -> Rates:
    """Return the learning rates: those given, else those that worked for the structure."""
    default = default_rates(*_structure(settings))
    given = {name: getattr(settings, name) for name in vars(default)}
    for name, rate in given.items():
        if rate is not None and not rate > 0:
            raise ConfigError(f"{name}={rate} trains nothing. Use a positive number.")
    return replace(default, **{name: rate for name, rate in given.items() if rate is not None})


def _structure(settings: TrainSettings) -> tuple[str, str, str]:
    """Return core, magnitude and what trains; of a peer those of its like."""
    if settings.method in PEERS:
        return "identity", "per_output" if settings.method == "peft_dora" else "none", "all"
    row = METHODS.get(settings.method)
    if settings.basis is not None:
        of = _basis(settings)
        return str(of.core), str(settings.magnitude or of.magnitude), "cores"
    if row is None:  # refused with its name when the configuration is made
        return "free", "none", "all"
    return (
        settings.core or row.core,
        settings.magnitude or row.magnitude,
        settings.trainable or row.train,
    )
