"""Magnitudes: what happens to a whole module's weight after the update.

A magnitude is given the base weight and the update, in the two forms in which they exist: as weights when
merging, as activations in the forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Magnitude(ABC):
    """Rule on a whole module. `additive` says that the result is `W + ΔW`, so it has an exact LoRA form."""

    additive: bool

    @abstractmethod
    def weight(
        self,
        W: Tensor,  # (out, in)
        dW: Tensor,  # (out, in)
    ) -> Tensor:  # (out, in)
        """Return the adapted weight."""

    @abstractmethod
    def output(
        self,
        base: Tensor,  # (*n, out), W x + b
        update: Tensor,  # (*n, out), ΔW x
    ) -> Tensor:  # (*n, out)
        """Return the adapted output."""


class NoMagnitude(Magnitude):
    """`W' = W + ΔW`."""

    additive = True

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        return W + dW

    def output(self, base: Tensor, update: Tensor) -> Tensor:
        return base + update


MAGNITUDES: dict[str, Magnitude] = {"none": NoMagnitude()}
