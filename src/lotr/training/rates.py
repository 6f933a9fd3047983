"""Learning rates for the parts of an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel

from ..errors import ConfigError
from ..math.init import ORTHONORMAL
from ..tuner.config import LotrConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from .settings import TrainSettings


def default_rates(config: PeftConfig, decoder: bool) -> dict[str, float]:
    """Return rates of AdamW to start from: they worked with MiniLM, and with SmolLM2 where the model is a decoder.

    `lr` is that of the factors, or of all of another method, and `head_lr` that of the modules that are saved in full.
    """
    lr = 1e-2 if decoder else 3e-3  # on encoders some runs gain a point at 1e-2, and some lose their way
    head_lr = 1e-4 if decoder else 3e-2  # a decoder's are pre-trained
    rates = {"lr": lr, "core_lr": 1e-2, "magnitude_lr": 3e-3, "head_lr": head_lr}
    if not isinstance(config, LotrConfig):
        return rates
    alone = config.trainable == "cores"
    if config.core == "tt":
        rates["core_lr"] = 3e-3  # a product of several trained matrices moves faster than one
    elif alone:
        rates["core_lr"] = 2e-2
    if config.core == "free" and config.init in ORTHONORMAL and (alone or config.zero == "core"):
        # a step of Adam moves the update by about σ, the rate and the rank multiplied
        if alone or decoder:
            rates["core_lr"] = min(rates["core_lr"], (0.32 if alone else 0.16) / _rank(config))
        rates["core_lr"] /= config.scaling
    if config.magnitude == "base_and_update":
        # two numbers, as large as whole norms, have further to go than norms of features
        rates["magnitude_lr"] = 1e-1
    return rates


def _rank(config: LotrConfig) -> int:
    """Return the largest rank of an adapter, as it was cut to the size of blocks where it was made."""
    if config.targets is None:
        return max(max(rank) for rank in config.ranks)
    return max(max(group.rank) for group in config.recorded_plan().groups)


def rates_of(settings: TrainSettings, model: PeftModel) -> dict[str, float]:
    """Return the rates of the settings, else those to start from."""
    return {
        name: rate if (own := getattr(settings, name)) is None else own
        for name, rate in _rates_to_start_from(model).items()
    }


def _rates_to_start_from(model: nn.Module) -> dict[str, float]:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "parameter_groups needs lr where the model is not what get_peft_model returned. Name lr."
        )
    decoder = getattr(model.get_base_model(), "can_generate", bool)()
    first, *others = (default_rates(model.peft_config[name], decoder) for name in model.active_adapters)
    if any(other != first for other in others):
        raise ConfigError(
            f"The active adapters {model.active_adapters} start from unlike rates. Name lr and core_lr."
        )
    return first


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
        lr: Learning rate of the factors, and of whatever is none of the others; alone, of everything. Without it a
            part that is not named has the rate that `lotr train` gives it.
        core_lr: Learning rate of the cores.
        magnitude_lr: Learning rate of the magnitudes.
        head_lr: Learning rate of the modules that are saved in full.

    Returns:
        Groups with `params`, `lr` and `name`, without empty ones.

    Raises:
        ConfigError: No `lr`, and no rate is known: there is no adapter, or active ones start from unlike rates.

    Source: a rate of its own for one factor is the idea of LoRA+ (arXiv 2402.12354); here it is the cores'.

    Example:
        >>> from torch import nn
        >>> [group["name"] for group in parameter_groups(nn.Linear(2, 2), lr=1e-3)]
        ['factors']
    """
    params: dict[str, list[Any]] = {name: [] for name in ("factors", "cores", "magnitudes", "head")}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((p for p, marks in _PARTS.items() if any(m in path for m in marks)), "factors")
            params[part].append(parameter)
    named = {"lr": lr, "core_lr": core_lr, "magnitude_lr": magnitude_lr, "head_lr": head_lr}
    rates = _rates_to_start_from(model) if lr is None else dict.fromkeys(named, lr)
    rates |= {name: rate for name, rate in named.items() if rate is not None}
    return [
        {"params": params[part], "lr": rate, "name": part}
        for part, rate in zip(params, rates.values(), strict=True)
        if params[part]
    ]
