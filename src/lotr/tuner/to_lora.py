"""PEFT's own way from an adapter to a LoRA, `peft.convert_to_lora`, with the factors that are at hand."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import conversion
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..math.update import loras_of
from .group import LotrGroup
from .weight import AdaptedWeight

_of_peft = conversion._convert_module_to_lora


@torch.no_grad()
def _lora_of_module(module: Any, rank: float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
    """Return `A`, `B` and their rank: exactly where `rank` allows it, else the nearest of that rank.

    PEFT decomposes `ΔW` as a dense matrix.
    """
    if not isinstance(module, AdaptedWeight):
        return _of_peft(module, rank, adapter_name)
    if adapter_name not in module.adapters:  # PEFT leaves out a module of rank zero
        return torch.empty(0), torch.empty(0), 0
    shape = (module.out_features, module.in_features)
    [(A, B)] = loras_of(module.factored(adapter_name), shape)
    dtype = module.dtype(adapter_name)
    if isinstance(rank, float) or rank < len(A):
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        left, values, right = torch.linalg.svd(R_B @ R_A.T)
        cut = conversion._find_cutoff_index(values, rank) if isinstance(rank, float) else rank
        A, B = right[:cut] @ Q_A.T, Q_B @ (left[:, :cut] * values[:cut])
    return A.to(dtype).contiguous(), B.to(dtype).contiguous(), len(A)


class _WithoutGroups(type):
    def __instancecheck__(cls, module: object) -> bool:
        return isinstance(module, BaseTunerLayer) and not isinstance(module, LotrGroup)


class _Converted(metaclass=_WithoutGroups):
    """What the converter takes for an adapted layer: a group has no weight, it is in the LoRA of its layers."""


def teach_conversion() -> None:
    """Put the exact form in PEFT's converter, once."""
    conversion._convert_module_to_lora = _lora_of_module
    vars(conversion)["BaseTunerLayer"] = _Converted
