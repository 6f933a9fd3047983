"""Dropout of an update, where the paper of a method places it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

#: Place → what is dropped in `σ · U · C_s · Vᵀ x`.
PLACES = {
    "input": "numbers of x, as LoRA",
    "core_output": "numbers of C Vᵀ x, which U multiplies, as FacT",
    "components": "slices of a Tucker core and terms of a CP core, as TensLoRA",
    "update": "numbers of ΔW, which is built for it, as CaRA",
}


@dataclass(frozen=True)
class Dropout:
    """Dropout of one adapter while it trains.

    Args:
        rate: Probability of dropping a number; what stays is divided by one minus it.
        place: A key of `PLACES`.

    Example:
        >>> import torch
        >>> drop, x = Dropout(0.5, "input"), torch.ones(1000)
        >>> sorted(set(drop("input", x).tolist())), drop("core_output", x) is x
        ([0.0, 2.0], True)
    """

    rate: float = 0.0
    place: str = "input"

    def at(self, place: str) -> float:
        """Return the rate at a place; zero everywhere but at its own."""
        return self.rate if place == self.place else 0.0

    def __call__(self, place: str, x: Tensor) -> Tensor:
        """Return `x`, at a place, with numbers dropped if it is the place of this dropout."""
        rate = self.at(place)
        return F.dropout(x, rate) if rate else x
