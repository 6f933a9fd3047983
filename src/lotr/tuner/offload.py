"""Adapters on a base model whose weights accelerate keeps in memory or on disk until a module runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import PlanError


def device_of_adapter(base_layer: nn.Module, device: torch.device | None) -> torch.device | None:
    """Return where an adapter of a module lives: with its weight, or where an offloaded one runs.

    An offloaded weight is on the meta device until its module is called. Numbers that followed it there would be lost.
    """
    hook = getattr(base_layer, "_hf_hook", None)
    if device is None or device.type != "meta" or hook is None:
        return device
    runs_on: Any = getattr(hook, "execution_device", None)
    return torch.device("cpu" if runs_on is None else runs_on)


def check_offload(model: nn.Module, path: str, base_layer: nn.Module) -> None:
    """Refuse a base model that PEFT took apart while it loads an adapter.

    `PeftModel.from_pretrained` takes the hooks off an offloaded model and lays its own index of files over it, in which
    numbers that belong to no module of the base have no place.

    Raises:
        PlanError: The message says how the adapter is loaded.
    """
    weight: Any = getattr(base_layer, "weight", None)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    taken_apart = weight is not None and weight.is_meta and not hasattr(base_layer, "_hf_hook")
    if taken_apart and devices & {"cpu", "disk"}:
        raise PlanError(
            f"The weight of {path!r} is offloaded, and PeftModel.from_pretrained would lose the shared factors on such "
            "a model. Make the adapter first, model = get_peft_model(base, LotrConfig.from_pretrained(folder)), and "
            "then read its numbers: set_peft_model_state_dict(model, load_peft_weights(folder))."
        )
