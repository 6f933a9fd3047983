"""Checkpointing that cannot train shared factors: reentrant, in several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError
from .weight import AdaptedWeight


def check_checkpointing(model: nn.Module) -> None:
    """Refuse a forward pass that DistributedDataParallel could not bring to an end in the backward pass.

    A reentrant checkpoint runs a backward pass of its own for every layer, and each tells DistributedDataParallel that
    the factors are ready, which it accepts once.

    Raises:
        TrainingError: Trained factors of several modules lie under reentrant checkpoints.
    """
    if torch.compiler.is_compiling():
        return
    engine: Any = DistributedDataParallel._get_active_ddp_module()
    if engine is None or engine.static_graph or not model.training or not torch.is_grad_enabled():
        return
    if not any(_is_reentrant(module) for module in model.modules()):
        return
    users: dict[nn.Module, int] = {}
    for layer in model.modules():
        if isinstance(layer, AdaptedWeight):
            active = [own for name, own in layer.adapters.items() if name in layer.active_adapters]
            groups = {group for own in active for _, group in own.parts}
            for group in groups:
                users[group] = users.get(group, 0) + 1
    if any(n > 1 and any(p.requires_grad for p in group.parameters()) for group, n in users.items()):
        raise TrainingError(
            "Reentrant checkpoints under DistributedDataParallel cannot train factors that several layers share. Use "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}), or '
            "DistributedDataParallel(model, static_graph=True)."
        )


def _is_reentrant(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    own = getattr(function, "keywords", {})
    return (
        bool(getattr(module, "gradient_checkpointing", False)) and own.get("use_reentrant", True) is not False
    )
