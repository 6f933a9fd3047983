"""From settings to a model with an adapter of any method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, near
from ..methods import METHODS
from .budget import AUTO, check_budget_is_meant
from .data import check_task
from .parsing import check_positive, read_core_ranks, read_modes, read_rank, target_modules
from .rates import Rates, default_rates

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from lotr_cli.settings import TrainSettings

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
        "target_modules": target_modules(settings.target_modules),
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
        fields = {name: fields[name] for name in _given(settings)}
    with _called_as_in_settings():
        config = LotrConfig(
            basis=settings.basis,
            modes=read_modes(settings.modes),
            core=settings.core,
            core_ranks=read_core_ranks(settings.core_ranks),
            blocks=settings.blocks,
            magnitude=settings.magnitude,
            trainable=settings.trainable,
            init=settings.init,
            dropout=settings.dropout,
            seed=settings.seed,
            **fields,
            **common,
        )
    if settings.basis is not None:  # what the report says is what was trained
        settings.method, settings.scaling = config.method, config.scaling
        settings.rank = ",".join(map(str, dict.fromkeys(config.rank)))
    return config


def choose_start(settings: TrainSettings, config: PeftConfig, task: str) -> None:
    """Start from updates where that was left open and factors would stay as random as they begin.

    It was measured behind a new head (docs/quality.md), so models that write text start as before.
    """
    from ..tuner.config import LotrConfig

    left_open = settings.init is None and settings.basis is None and task != "causal-lm"
    if not (left_open and isinstance(config, LotrConfig) and config.trainable == "cores"):
        return
    if config.init == "orthonormal" and config.starts_at_zero:
        settings.init = config.init = "update"


def start_batches(settings: TrainSettings, steps: int) -> int:
    """Return how many batches a start from data looks at: as many as asked, else 8.

    For the short training of a start from updates, which takes one a step, half of the run's steps and at most 50.
    """
    if settings.start_batches is not None:
        return settings.start_batches
    return min(50, max(1, steps // 2)) if settings.init == "update" else 8


def _given(settings: TrainSettings) -> list[str]:
    """Return which fields of a configuration, of those that settings always have, were set to something else."""
    names = {"r": "rank", "method": "method", "scaling": "scaling"}
    return [
        field for field, name in names.items() if getattr(settings, name) != getattr(type(settings), name)
    ]


#: Settings of this library's methods, which PEFT's own do not know.
_OURS = ("modes", "core", "core_ranks", "blocks", "magnitude", "trainable", "init", "basis", "budget")


def _check_meaning(settings: TrainSettings, task: str) -> None:
    """Refuse settings that would be passed over."""
    check_task(task)
    check_positive(settings, "start_batches")
    check_budget_is_meant(settings)
    if settings.method in PEERS:
        given = [name for name in _OURS if getattr(settings, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]}={getattr(settings, given[0])!r} has no meaning with method={settings.method!r}, which is "
                "not a row of the table. Leave it out, or name a row (`lotr methods`)."
            )
    moves = {"trainable": settings.trainable == "all", "init": settings.init is not None}
    if settings.basis is not None and any(moves.values()):
        name = next(name for name, asked in moves.items() if asked)
        raise ConfigError(
            f"{name}={getattr(settings, name)!r} contradicts basis={settings.basis!r}, whose factors are kept. Leave "
            "one of them out."
        )
    if settings.head_warmup and task == "causal-lm":
        raise ConfigError(
            f"head_warmup={settings.head_warmup} has no meaning for causal-lm, where no head is new. Leave it out."
        )


#: What a configuration calls otherwise than the settings, in which `train` is the data.
_CALLED = {"train": "trainable", "r": "rank", "target_modules": "target"}


@contextmanager
def _called_as_in_settings() -> Iterator[None]:
    """Let what refuses a field of a configuration name the setting that it came from."""
    try:
        yield
    except ConfigError as error:
        said = re.sub(r"\b(train|r|target_modules)=", lambda m: f"{_CALLED[m[1]]}=", str(error))
        raise ConfigError(said) from error


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
    """Refuse names in `target_modules` that match no module, which PEFT passes over in silence, and such a regex.

    Raises:
        ConfigError: The message says what would match.
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from ..tuner.targets import linear_paths, match_nothing

    asked = getattr(config, "target_modules", None)
    paths = linear_paths(model)
    if isinstance(asked, str) and asked != "all-linear" and asked != DUMMY_TARGET_MODULES:
        if not any(re.fullmatch(asked, path) for path, _ in model.named_modules()):
            raise ConfigError(f"target_modules={asked!r} {match_nothing(model, asked)}")
    elif isinstance(asked, set | list | tuple):
        for name in sorted(asked):
            if not any(path == name or path.endswith(f".{name}") for path in paths):
                raise ConfigError(f"target_modules={name!r} {match_nothing(model, [name])}")


def head_warmup(settings: TrainSettings, task: str, steps: int) -> int:
    """Return for how many steps a new head trains alone: as many as asked, else a fifth of all and at most 20."""
    if settings.head_warmup is not None:
        return settings.head_warmup
    return min(20, steps // 5) if _warms_head(settings, task) else 0


def _warms_head(settings: TrainSettings, task: str) -> bool:
    # a head without an adapter has nothing to go before
    return settings.head_warmup != 0 and task != "causal-lm" and settings.method != "head"


def rates(settings: TrainSettings) -> Rates:
    """Return the learning rates: those given, else those that worked for the structure."""
    default = default_rates(*_structure(settings))
    given = {name: getattr(settings, name) for name in vars(default)}
    check_positive(settings, *given)
    return replace(default, **{name: rate for name, rate in given.items() if rate is not None})


def _structure(settings: TrainSettings) -> tuple[str, str, str]:
    """Return core, magnitude and what trains; of a peer those of its like."""
    if settings.method in PEERS:
        return "identity", "per_output" if settings.method == "peft_dora" else "none", "all"
    row = METHODS.get(settings.method)
    if settings.basis is not None:
        from ..tuner.config import LotrConfig

        config = LotrConfig(basis=settings.basis, magnitude=settings.magnitude)
        return str(config.core), str(config.magnitude), "cores"
    if row is None:  # refused with its name when the configuration is made
        return "free", "none", "all"
    return (
        settings.core or row.core,
        settings.magnitude or row.magnitude,
        settings.trainable or row.trainable,
    )
