"""A warning where an optimiser's rate cannot move an adapter: LoRA's usual rates are too low for orthonormal factors.

The update of an adapter whose cores start at zero between orthonormal factors is as large as its cores, whatever the
width. Adam moves a number by about its rate a step, so `σ`, the rate and the rank say how fast the update grows.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..math.init import ORTHONORMAL
from .config import LotrConfig
from .group import LotrLayer

_LEAST = 5e-4  # of σ times the rate: 2e-4 takes MiniLM's loss from 2.33 to 2.30 in 100 steps, 3e-3 to 1.82
_RANK = 16  # of those runs
_SPEED = "_lotr_speed"
_seen: WeakSet[Optimizer] = WeakSet()


def watch_rates(model: nn.Module, adapter: str, config: LotrConfig) -> None:
    """Let the first step of an optimiser that has the cores of an adapter warn of a rate that is too low."""
    if config.zero != "core" or config.init not in ORTHONORMAL:
        return
    for layer in model.modules():
        for name in ("lotr_C", "lotr_core") if isinstance(layer, LotrLayer) else ():
            numbers: Any = getattr(layer, name, {})
            for parameter in numbers[adapter].parameters() if adapter in numbers else ():
                rank = max(_RANK, *parameter.shape[-2:]) if name == "lotr_C" else _RANK
                setattr(parameter, _SPEED, config.scaling * rank / _RANK)


def _check(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if optimizer in _seen or not isinstance(optimizer, Adam | AdamW):
        return
    _seen.add(optimizer)
    speeds = {
        (float(group.get("initial_lr", group["lr"])), float(getattr(parameter, _SPEED)))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if hasattr(parameter, _SPEED)
    }
    if speeds and max(rate * speed for rate, speed in speeds) < _LEAST:
        warnings.warn(
            f"At a learning rate of {max(speeds)[0]:g} the adapter hardly moves: its factors are orthonormal, so the "
            "update is as small as its cores. Give the optimizer lotr.parameter_groups(model), or the adapter a larger "
            "scaling: scaling=16 for LoRA's usual 2e-4.",
            stacklevel=2,
        )


register_optimizer_step_pre_hook(_check)
