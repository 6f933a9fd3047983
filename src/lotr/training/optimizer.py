"""Learning rates for the parts of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the factors (or of all of another method), of the cores, of a new head."""

    lr: float
    core_lr: float
    head_lr: float


#: Rates that worked for a method, found on a part of the built-in training data with the packaged MiniLM.
DEFAULT_RATES = {
    "lotr": Rates(lr=3e-3, core_lr=1e-2, head_lr=3e-2),
    "lora": Rates(lr=3e-3, core_lr=3e-3, head_lr=3e-2),
    "head": Rates(lr=3e-2, core_lr=3e-2, head_lr=3e-2),
}


def parameter_groups(
    model: nn.Module, lr: float, core_lr: float | None = None, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a PEFT model for any torch optimiser.

    Args:
        model: A model with a LoTR adapter, or any other.
        lr: Learning rate of the factors, and of whatever is neither core nor head.
        core_lr: Learning rate of the cores; default `lr`.
        head_lr: Learning rate of the modules that are saved in full; default `lr`.

    Returns:
        Groups with `params`, `lr` and `name`, without empty ones.

    Example:
        >>> from torch import nn
        >>> [group["name"] for group in parameter_groups(nn.Linear(2, 2), lr=1e-3)]
        ['factors']
    """
    parts: dict[str, list[Any]] = {"factors": [], "cores": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            core, head = ".lotr_C." in name, ".modules_to_save." in name
            parts["cores" if core else "head" if head else "factors"].append(parameter)
    rates = {
        "factors": lr,
        "cores": lr if core_lr is None else core_lr,
        "head": lr if head_lr is None else head_lr,
    }
    return [{"params": params, "lr": rates[name], "name": name} for name, params in parts.items() if params]
