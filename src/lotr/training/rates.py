"""Learning rates for the parts of an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel

from ..errors import ConfigError
from ..tuner.config import LotrConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from .settings import TrainSettings


def default_rates(config: PeftConfig, trainable: str | None = None) -> dict[str, float]:
    """Return rates of AdamW that worked for an adapter: on encoders with MiniLM, on decoders with SmolLM2.

    `lr` is that of the factors, or of all of another method, and `head_lr` that of a new head. `trainable` stands for
    the configuration's own. A step of cores moves the update by about σ, their rate and the rank multiplied: a large
    rank takes a smaller rate, and σ changes nothing where free cores start at zero.
    """
    own = config if isinstance(config, LotrConfig) else None
    rank = max(own.rank) if own else 1
    decoder = config.task_type == "CAUSAL_LM"
    if own and own.core == "tt":
        core_lr = 3e-3  # a product of several trained matrices moves faster than one
    elif own and (trainable or own.trainable) == "cores":
        core_lr = min(2e-2, 0.32 / rank)  # they have the way to themselves
    else:
        core_lr = min(1e-2, 0.16 / rank) if decoder else 1e-2
    if own and own.zero == "core" and own.core == "free":
        core_lr /= own.scaling
    return {
        "lr": 1e-2
        if decoder
        else 3e-3,  # on encoders some runs gain a point at 1e-2, and some lose their way
        "core_lr": core_lr,
        # two numbers that are as large as whole norms have further to go than norms of single features
        "magnitude_lr": 1e-1 if own and own.magnitude == "base_and_update" else 3e-3,
        "head_lr": 3e-2,
    }


def rates_of(settings: TrainSettings, config: PeftConfig) -> dict[str, float]:
    """Return the rates of the settings, else those that worked for the adapter."""
    return {
        name: rate if (own := getattr(settings, name)) is None else own
        for name, rate in default_rates(config).items()
    }


#: What a parameter's path says about its part; the factors are the rest.
_PARTS = {
    "cores": (".lotr_C.", ".lotr_core."),
    "magnitudes": (".lotr_magnitude.", ".lora_magnitude_vector."),
    "head": (".modules_to_save.",),
}


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    core_lr: float | None = None,
    magnitude_lr: float | None = None,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a PEFT model for any torch optimiser.

    Args:
        model: A model with a LoTR adapter, or any other.
        lr: Learning rate of the factors, and of whatever is none of the others. Without it every part that is not
            named has the rate that `lotr train` gives it.
        core_lr: Learning rate of the cores; default `lr`.
        magnitude_lr: Learning rate of the magnitudes; default `lr`.
        head_lr: Learning rate of the modules that are saved in full; default `lr`.

    Returns:
        Groups with `params`, `lr` and `name`, without empty ones.

    Raises:
        ConfigError: No `lr`, and the model has no adapter of PEFT's whose rate could be known.

    Source: a rate of its own for one factor is the idea of LoRA+ (arXiv 2402.12354); here it is the cores'.

    Example:
        >>> from torch import nn
        >>> [group["name"] for group in parameter_groups(nn.Linear(2, 2), lr=1e-3)]
        ['factors']
    """
    rates = {"lr": lr, "core_lr": core_lr, "magnitude_lr": magnitude_lr, "head_lr": head_lr}
    if lr is None:
        if not isinstance(model, PeftModel):
            raise ConfigError(
                "parameter_groups needs lr: rates are known for adapters, and this is no PeftModel."
            )
        defaults = default_rates(model.peft_config[model.active_adapters[0]])
        rates = {name: defaults[name] if rate is None else rate for name, rate in rates.items()}
    rates = dict(zip(("factors", "cores", "magnitudes", "head"), rates.values(), strict=True))
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
