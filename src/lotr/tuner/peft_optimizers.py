"""PEFT's optimisers for LoRA, which go by LoRA's names of parameters and would pass over those of this library."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft import optimizers

from ..errors import ConfigError
from .group import LotrLayer

_NAMES = {"create_loraplus_optimizer": "loraplus", "create_lorafa_optimizer": "lorafa"}


def refuse_adapters() -> None:
    """Make these optimisers refuse a model with adapters of this library, wherever PEFT offers them."""
    for name, file in _NAMES.items():
        checked = _checked(getattr(optimizers, name))
        for module in (optimizers, getattr(optimizers, file)):
            setattr(module, name, checked)


def _checked(create: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create)
    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, LotrLayer) for module in model.modules()):
            raise ConfigError(
                f"{create.__name__} finds what it treats apart by LoRA's names (lora_A, lora_B), and would train every "
                "number of this adapter as plain AdamW does. Rates by part: torch.optim.AdamW(lotr.parameter_groups("
                'model, lr=3e-3, core_lr=1e-2)). Cores alone, as LoRA-FA trains B: LotrConfig(trainable="cores").'
            )
        return create(model, *args, **kwargs)

    return checked
