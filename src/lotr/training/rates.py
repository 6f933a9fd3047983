"""Learning rates for the parts of an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..tuner.config import LotrConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from .settings import TrainSettings


def default_rates(core: str, magnitude: str, train: str = "all") -> dict[str, float]:
    """Return rates of AdamW that worked for a structure, on a part of the built-in data with the packaged MiniLM.

    `lr` is that of the factors, or of all of another method, and `head_lr` that of a new head.
    """
    # a product of several trained matrices moves faster than one; cores alone have the way to themselves;
    # two numbers that are as large as whole norms have further to go than norms of single features
    return {
        "lr": 3e-3,  # at 1e-2 some runs gain a point, and now and then one loses its way
        "core_lr": 3e-3 if core == "tt" else 2e-2 if train == "cores" else 1e-2,
        "magnitude_lr": 1e-1 if magnitude == "base_and_update" else 3e-3,
        "head_lr": 3e-2,
    }


def rates_of(settings: TrainSettings, config: PeftConfig) -> dict[str, float]:
    """Return the rates of the settings, else those that worked for the structure."""
    rates = default_rates("identity", "none")
    if isinstance(config, LotrConfig):
        rates = default_rates(config.core, config.magnitude, config.trainable)
    return {name: rate if (own := getattr(settings, name)) is None else own for name, rate in rates.items()}


#: What a parameter's path says about its part; the factors are the rest.
_PARTS = {
    "cores": (".lotr_C.", ".lotr_core."),
    "magnitudes": (".lotr_magnitude.", ".lora_magnitude_vector."),
    "head": (".modules_to_save.",),
}


def parameter_groups(
    model: nn.Module,
    lr: float,
    core_lr: float | None = None,
    magnitude_lr: float | None = None,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a PEFT model for any torch optimiser.

    Args:
        model: A model with a LoTR adapter, or any other.
        lr: Learning rate of the factors, and of whatever is none of the others.
        core_lr: Learning rate of the cores; default `lr`.
        magnitude_lr: Learning rate of the magnitudes; default `lr`.
        head_lr: Learning rate of the modules that are saved in full; default `lr`.

    Returns:
        Groups with `params`, `lr` and `name`, without empty ones.

    Source: a rate of its own for one factor is the idea of LoRA+ (arXiv 2402.12354); here it is the cores'.

    Example:
        >>> from torch import nn
        >>> [group["name"] for group in parameter_groups(nn.Linear(2, 2), lr=1e-3)]
        ['factors']
    """
    rates = {"factors": lr, "cores": core_lr, "magnitudes": magnitude_lr, "head": head_lr}
    params: dict[str, list[Any]] = {name: [] for name in rates}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((p for p, marks in _PARTS.items() if any(m in path for m in marks)), "factors")
            params[part].append(parameter)
    return [
        {"params": params[name], "lr": lr if rate is None else rate, "name": name}
        for name, rate in rates.items()
        if params[name]
    ]
