"""From settings to a model with an adapter of any method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig

from ..bank.task import TASK_TYPES
from ..errors import ConfigError, near
from ..math.init import DATA_INITS
from ..methods import METHODS
from ..tuner.config import LotrConfig
from ..tuner.ranks import largest_rank
from ..tuner.saved_adapter import read_saved
from .given_config import rank_text, resolved
from .settings import (
    OF_ADAPTER,
    Settings,
    TrainSettings,
    read_core_ranks,
    read_modes,
    read_names,
    read_rank,
    read_target_modules,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

#: The rank that a budget of trained numbers decides.
AUTO = "auto"
#: Methods that are not rows of the table: PEFT's own for comparison, and a new head alone.
PEERS = ("peft_lora", "peft_dora", "head")
#: Settings of the adapter that PEFT's own methods know, too.
_OF_PEERS = ("method", "rank", "target_modules", "target_parameters", "scaling", "dropout")

#: The most of a setting that may be zero; others must be positive.
_FROM_ZERO = {
    "warmup": 1,
    "weight_decay": 10**6,
    "adam_beta2": 0.999999,
    "seed": 2**32 - 1,
    "head_warmup": 10**9,
}
#: The most of others: beyond, a run neither fits into a memory nor ends.
_MOST = {"epochs": 10**6, "batch_size": 10**6, "max_length": 10**6}
#: Checked elsewhere: by the configuration, and the sampler of tasks.
_CHECKED = ("alpha", "dropout", "layers_per_group", "scaling", "temperature")


def adapter_config(settings: TrainSettings, task: str | None = None) -> PeftConfig:
    """Return the PEFT configuration that the settings describe; the task decides the type of the model alone."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    _check_meaning(settings)
    common: dict[str, Any] = {
        "task_type": None if task is None else TASK_TYPES[task],
        "target_modules": read_target_modules(settings.target_modules),
        "target_parameters": read_names(settings.target_parameters),
    }
    if settings.method == "head":
        return LotrConfig(**{**common, "target_modules": DUMMY_TARGET_MODULES})
    if settings.method in PEERS:
        k, r = read_rank(str(settings.rank))
        if k != r:
            raise ConfigError(f"rank={settings.rank!r} is a pair, and LoRA has one rank. Use one number.")
        return LoraConfig(
            r=r,
            lora_alpha=(settings.scaling or 1.0) * r,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            use_dora=settings.method == "peft_dora",
            **common,
        )
    if settings.method is not None and settings.method not in METHODS:
        raise ConfigError(
            f"method={settings.method!r} is not known. {near(settings.method, [*METHODS, *PEERS])} "
            "`lotr methods` describes them."
        )
    options: dict[str, Any] = {
        **{name: value for name, value in vars(settings).items() if name in LotrConfig.__dataclass_fields__},
        **common,
        "modes": read_modes(settings.modes),
        "core_ranks": read_core_ranks(settings.core_ranks),
    }
    if settings.rank is not None:
        options["r"] = (1, 1) if settings.rank == AUTO else read_rank(settings.rank)  # `fit_rank` decides
    return resolved(LotrConfig(**options))


def _check_meaning(settings: TrainSettings) -> None:
    """Refuse settings that would be passed over."""
    check_numbers(settings)
    method, basis, rank, budget = settings.method, settings.basis, settings.rank, settings.budget
    ours = [name for name in OF_ADAPTER if name not in _OF_PEERS]
    misfits = [name for name in ours if method in PEERS and getattr(settings, name) is not None]
    misfits += ["target_parameters"] if method == "head" and settings.target_parameters is not None else []
    problem = ""
    if (rank == AUTO) != (budget is not None):
        problem = (
            f"rank={rank!r} with budget={budget}: rank='auto' and a budget of trained numbers go together. "
        )
        problem += "Name both, as in --rank auto --budget 9216, or neither."
    elif budget is not None and basis is not None:
        problem = (
            f"budget={budget} chooses ranks, and those of basis={basis!r} are kept. Leave one of them out."
        )
    elif misfits:
        problem = f"{misfits[0]}={getattr(settings, misfits[0])!r} has no meaning with method={method!r}, which is not "
        problem += "a row of the table. Leave it out, or name a row (`lotr methods`)."
    elif basis is not None and settings.trainable == "all":
        problem = (
            f"trainable='all' contradicts basis={basis!r}, whose factors are kept. Leave one of them out."
        )
    if problem:
        raise ConfigError(problem)


def check_numbers(settings: Settings) -> None:
    """Raise ConfigError for the first setting that is a number and out of its range."""
    for name, value in vars(settings).items():
        if type(value) not in (int, float) or name in _CHECKED:
            continue
        if name in _FROM_ZERO and not 0 <= value <= _FROM_ZERO[name]:
            raise ConfigError(f"{name}={value} is out of range. Use a number from 0 to {_FROM_ZERO[name]:,}.")
        if name not in _FROM_ZERO and not value > 0:
            raise ConfigError(f"{name}={value} trains nothing. Use a positive number.")
        if value > (most := _MOST.get(name, 1e30)):
            raise ConfigError(f"{name}={value} is out of range. Use a number of at most {most:,}.")


def complete(settings: TrainSettings, config: PeftConfig, task: str) -> TrainSettings:
    """Decide what was left open, as the task and the basis have it; return the settings, and change the configuration.

    Cores that train alone start from gradients, where nothing else was asked for: factors that stay as they are would
    stay as random as they begin.
    """
    own, needed = str(config.task_type).rpartition(".")[2], TASK_TYPES[task]
    if config.task_type is not None and own != needed:
        raise ConfigError(
            f"task_type={own!r} contradicts the task, {task}, which is {needed}. Leave it out, or name another task."
        )
    config.task_type = needed
    if task == "causal-lm" and settings.method == "head":
        raise ConfigError(
            "method='head' trains a new head alone, and causal-lm has none. Use another method."
        )
    if task == "causal-lm" and settings.head_warmup:
        raise ConfigError(
            f"head_warmup={settings.head_warmup} has no meaning for causal-lm, where no head is new. Leave it out."
        )
    if not isinstance(config, LotrConfig) or settings.method in PEERS:
        return settings
    if config.would_stay_random and config.starts_at_zero:
        config.init = "gradient"
    start = config.init if config.init in DATA_INITS and config.basis is None else None
    if start == "lora":
        raise ConfigError(
            "init='lora' needs the LoRA, and training has no setting for it. In Python: "
            "lotr.init_from_lora(model, folder)."
        )
    if start is None and settings.start_batches is not None:
        raise ConfigError(
            f"start_batches={settings.start_batches} has no meaning where the factors do not start from data. Leave "
            "it out, or use init='gradient'."
        )
    if config.basis is not None:  # what the report says is what was trained
        return replace(
            settings, method=config.method, scaling=config.scaling, rank=rank_text(config), init=None
        )
    return replace(settings, init=start or settings.init)


def fit_rank(settings: TrainSettings, config: Any, model: nn.Module, checkpoint: Path | None = None) -> str:
    """Give a configuration the rank that the budget allows, and return a line that tells it.

    A checkpoint of a run that goes on has the rank already.
    """
    budget = settings.budget or 0
    config.set_rank(read_saved(checkpoint).config.r if checkpoint else largest_rank(model, config, budget))
    return f"Rank: {config.r} is the largest that trains at most {budget:,} numbers."


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a base model; PlanError where a name matches nothing, ConfigError where PEFT refuses the configuration."""
    from peft import get_peft_model

    from ..tuner.names import check_names

    if not isinstance(
        config, LotrConfig
    ):  # which is checked where its names are mapped; PEFT passes over names
        check_names(model, config)
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
        if isinstance(module, ModulesToSaveWrapper) and next(module.parameters()).dtype.itemsize == 2:
            module.float()
            module.register_forward_pre_hook(cast)
    return model
