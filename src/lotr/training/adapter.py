"""From settings to a model with an adapter of any method."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, near
from ..methods import METHODS
from ..tuner.basis import resolve_basis
from ..tuner.config import LotrConfig
from .budget import AUTO, check_budget_is_meant
from .data import check_task
from .rates import Rates, default_rates

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from .settings import TrainSettings

#: Methods that are not rows of the table: PEFT's own for comparison, and a new head alone.
PEERS = ("peft_lora", "peft_dora", "head")
TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
#: Settings of this library's methods, which PEFT's own do not know.
_OURS = ("modes", "core", "core_ranks", "blocks", "magnitude", "trainable", "init", "basis", "budget")
#: Settings that are fields of the configuration as they are.
_AS_IN_CONFIG = ("basis", "core", "blocks", "magnitude", "trainable", "init", "dropout", "seed")
#: Settings that always have a value, and the field of the configuration that each sets.
_ALWAYS = {"rank": "r", "method": "method", "scaling": "scaling"}


def adapter_config(settings: TrainSettings, task: str | None = None) -> PeftConfig:
    """Return the PEFT configuration that the settings describe.

    Args:
        settings: Its settings of the adapter are read.
        task: classification, regression or causal-lm, where that is known; it decides the type of the model alone.

    Raises:
        ConfigError: A setting has no meaning; the message names it.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    _check_meaning(settings)
    common: dict[str, Any] = {
        "task_type": TASK_TYPES[task or "classification"],
        "target_modules": read_target_modules(settings.target_modules),
    }
    if settings.method == "head":
        return LotrConfig(**{**common, "target_modules": DUMMY_TARGET_MODULES})
    if settings.method in PEERS:
        k, r = read_rank(settings.rank)
        if k != r:
            raise ConfigError(f"rank={settings.rank!r} is a pair, and LoRA has one rank. Use one number.")
        return peft.LoraConfig(
            r=r,
            lora_alpha=settings.scaling * r,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            use_dora=settings.method == "peft_dora",
            **common,
        )
    if settings.method not in METHODS:
        raise ConfigError(
            f"method={settings.method!r} is not known. {near(settings.method, [*METHODS, *PEERS])} "
            "`lotr methods` describes them."
        )
    fields: dict[str, Any] = {
        "r": 1 if settings.rank == AUTO else read_rank(settings.rank),  # the model decides: `budget.fit`
        "method": settings.method,
        "scaling": settings.scaling,
    }
    if settings.basis is not None:  # what was left at its default is as in the basis
        changed = [name for name in _ALWAYS if getattr(settings, name) != getattr(type(settings), name)]
        fields = {_ALWAYS[name]: fields[_ALWAYS[name]] for name in changed}
    fields |= {"modes": read_modes(settings.modes), "core_ranks": read_core_ranks(settings.core_ranks)}
    fields |= {name: getattr(settings, name) for name in _AS_IN_CONFIG}
    config = LotrConfig(**fields, **common)
    if settings.basis is not None:
        resolve_basis(config)
    return config


def resolve(settings: TrainSettings, config: PeftConfig, task: str) -> TrainSettings:
    """Return the settings with what was left open, as the task and the basis decide it.

    Cores that train alone start from gradients, where nothing else was asked for: factors that stay as they are would
    stay as random as they begin.

    Raises:
        ConfigError: A setting has no meaning for the task.
    """
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
    if settings.basis is not None:  # what the report says is what was trained
        rank = ",".join(map(str, dict.fromkeys(config.rank)))
        return replace(settings, method=config.method, scaling=config.scaling, rank=rank)
    if (
        settings.init is None
        and (config.trainable, config.init) == ("cores", "orthonormal")
        and config.starts_at_zero
    ):
        return replace(settings, init="gradient")
    return settings


def _check_meaning(settings: TrainSettings) -> None:
    """Refuse settings that would be passed over."""
    if settings.task is not None:
        check_task(settings.task)
    check_positive(settings, "start_batches")
    check_budget_is_meant(settings)
    if settings.init == "lora":
        raise ConfigError(
            "init='lora' needs the LoRA, and training has no setting for it. In Python: "
            "lotr.init_from_lora(model, folder)."
        )
    if settings.method in PEERS:
        for name in _OURS:
            if getattr(settings, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(settings, name)!r} has no meaning with method={settings.method!r}, which is not "
                    "a row of the table. Leave it out, or name a row (`lotr methods`)."
                )
    if settings.basis is not None:
        for name, contradicts in (("trainable", settings.trainable == "all"), ("init", settings.init)):
            if contradicts:
                raise ConfigError(
                    f"{name}={getattr(settings, name)!r} contradicts basis={settings.basis!r}, whose factors are kept. "
                    "Leave one of them out."
                )


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a base model.

    Raises:
        PlanError: A name of the configuration matches nothing.
        ConfigError: PEFT refuses the configuration.
    """
    from peft import get_peft_model

    from ..tuner.names import check_names

    check_names(model, config)  # PEFT's own methods pass over names
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


def rates(settings: TrainSettings, config: PeftConfig) -> Rates:
    """Return the learning rates: those of the settings, else those that worked for the structure."""
    if isinstance(config, LotrConfig):
        default = default_rates(str(config.core), str(config.magnitude), str(config.trainable))
    else:
        default = default_rates("identity", "none")
    named = {name: getattr(settings, name) for name in vars(default)}
    return replace(default, **{name: rate for name, rate in named.items() if rate is not None})


def read_modes(text: str | None) -> tuple[str, ...] | None:
    """Read coordinates with commas; `none` shares nothing.

    Example:
        >>> read_modes("layer, projection"), read_modes("none"), read_modes(None)
        (('layer', 'projection'), (), None)
    """
    if text is None:
        return None
    return tuple(mode for mode in re.split(r"[,\s]+", text) if mode and mode != "none")


def read_core_ranks(text: str | None) -> int | dict[str, int] | None:
    """Read `4`, or `layer=8,head=4`.

    Example:
        >>> read_core_ranks("4"), read_core_ranks("layer=8,head=4")
        (4, {'layer': 8, 'head': 4})
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        return {name.strip(): int(n) for name, n in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(
            f"core_ranks={text!r} holds no ranks. Use a number, or `mode=number` with commas between."
        ) from None


def read_rank(text: str) -> tuple[int, int]:
    """Read `16` or `8,16`.

    Example:
        >>> read_rank("8,16")
        (8, 16)
    """
    parts = str(text).split(",")
    if len(parts) > 2 or not all(re.fullmatch(r"\s*[1-9]\d*\s*", part) for part in parts):
        raise ConfigError(
            f"rank={text!r} is not a rank. Use a positive integer, a pair `k,r` of them, or `auto`."
        )
    return int(parts[0]), int(parts[-1])


def read_target_modules(text: str | None) -> list[str] | str | None:
    """Read names with commas, a regex, or `all-linear`.

    Example:
        >>> read_target_modules("query,value"), read_target_modules("all-linear"), read_target_modules("layer.[01].*")
        (['query', 'value'], 'all-linear', 'layer.[01].*')
    """
    if text is None or text == "all-linear":
        return text
    if not re.search(r"[*+?()\[\]|\\^$]", text):  # a character that no module's name has
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"target_modules={text!r} is not a regex: {error}. Name modules with commas instead."
        ) from None
    return text


def check_positive(settings: object, *names: str) -> None:
    """Refuse numbers that are not positive.

    Raises:
        ConfigError: The message names the first of them.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} trains nothing. Use a positive number.")
