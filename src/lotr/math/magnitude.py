"""Magnitudes: what happens to a whole module's weight after the update.

Every magnitude writes the adapted weight as `W' = (base ⊙ W + update ⊙ ΔW) · diag(input)` with gains that
depend on norms of `W + ΔW`. The norms are computed in factored form, in float32; `ΔW` is never built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from .cores import Numbers, Shapes
from .norms import BaseWeight, column_energy, row_energy, update_energy
from .update import FactoredUpdate

_TINY = 1e-30  # of a squared norm: a row of zeros has no direction, and must not be divided by


@dataclass(frozen=True)
class Gains:
    """`W' = (base ⊙ W + update ⊙ ΔW) · diag(input)`; `base` and `update` are `(out,)` or `(1,)`, `input` `(in,)`."""

    base: Tensor
    update: Tensor
    input: Tensor | None = None

    def weight(
        self,
        W: Tensor,  # (out, in)
        dW: Tensor,  # (out, in)
    ) -> Tensor:  # (out, in)
        """Return the adapted weight."""
        adapted = self.base[:, None] * W + self.update[:, None] * dW
        return adapted if self.input is None else adapted * self.input

    def output(
        self,
        base: Tensor,  # (*n, out), W x + b for the scaled x
        bias: Tensor | None,  # (out,), not scaled
        update: Tensor,  # (*n, out), ΔW x for the scaled x
    ) -> Tensor:  # (*n, out)
        """Return the adapted output. Gains of exactly one and an update of zero give `base` bit for bit."""
        linear = base if bias is None else base - bias
        return base + (self.base - 1) * linear + self.update * update

    @property
    def alike(self) -> bool:
        """Whether base and update have the same gain, so that only their sum is needed."""
        return self.base is self.update

    def of_sum(
        self,
        y: Tensor,  # (*n, out), base plus update
        bias: Tensor | None,  # (out,)
    ) -> Tensor:  # (*n, out)
        """Return the adapted output where the gains are alike. Gains of exactly one give `y` bit for bit."""
        scaled: Tensor = _Scaled.apply(y, self.base, bias)
        return scaled


class _Scaled(Function):
    """`gain ⊙ (y - bias) + bias`; PyTorch's own steps pass over the activation three more times."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, gain, bias)
        return y * gain if bias is None else torch.addcmul((1 - gain) * bias, y, gain)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        y, gain, bias = ctx.saved_tensors
        needs_y, needs_gain, needs_bias = ctx.needs_input_grad
        total = dz.sum_to_size(gain.shape) if bias is not None else None
        dgain = dbias = None
        if needs_gain:
            dgain = (dz * y).sum_to_size(gain.shape)
            dgain = dgain if bias is None else dgain - bias * total
        if needs_bias:
            dbias = total * (1 - gain)
        return dz * gain if needs_y else None, dgain, dbias


class Magnitude(ABC):
    """Rule on a whole module."""

    #: The result is `W + ΔW`, without gains.
    additive: ClassVar[bool] = False
    #: PEFT's LoRA can hold it exactly; with `use_dora` where it is not additive.
    has_lora_form: ClassVar[bool] = False
    #: The rule divides by the norm of the update, so the update must not start at zero.
    divides_by_update: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """Name and shape of the trained numbers of a module."""

    @abstractmethod
    def init(self, base: BaseWeight) -> dict[str, Tensor]:
        """Return the numbers with which the adapted weight is `W`."""

    @abstractmethod
    def gains(
        self, numbers: Numbers, base: BaseWeight, updates: Sequence[FactoredUpdate], constant: bool = True
    ) -> Gains:
        """Return the gains.

        Args:
            numbers: The trained numbers of the module.
            base: The base weight.
            updates: The parts of the update.
            constant: Norms are constants in the backward pass, as DoRA has them.
        """


class NoMagnitude(Magnitude):
    """`W' = W + ΔW`."""

    additive = has_lora_form = True

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {}

    def init(self, base: BaseWeight) -> dict[str, Tensor]:
        return {}

    def gains(
        self, numbers: Numbers, base: BaseWeight, updates: Sequence[FactoredUpdate], constant: bool = True
    ) -> Gains:
        one = base.row_energy().new_ones(1)
        return Gains(one, one)


class PerOutput(Magnitude):
    """`W' = m ⊙ (W + ΔW) / ‖W + ΔW‖_row`: one trained norm an output feature.

    Source: DoRA, arXiv 2402.09353.
    """

    has_lora_form = True

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"m": (out_features,)}

    def init(self, base: BaseWeight) -> dict[str, Tensor]:
        return {"m": _root(base.row_energy())}

    def gains(
        self, numbers: Numbers, base: BaseWeight, updates: Sequence[FactoredUpdate], constant: bool = True
    ) -> Gains:
        with _norms(constant):
            norms = _root(row_energy(base, updates))
        gain = numbers["m"] / norms
        return Gains(gain, gain)


class PerOutputAndInput(Magnitude):
    """Rows of `W + ΔW` get the norms `m_out`, then columns of the result get the norms `m_in`.

    `Z = m_out ⊙ (W + ΔW) / ‖W + ΔW‖_row`, `W' = Z / ‖Z‖_column · diag(m_in)`.

    Source: BoRA, arXiv 2412.06441.
    """

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"m_out": (out_features,), "m_in": (in_features,)}

    def init(self, base: BaseWeight) -> dict[str, Tensor]:
        one = torch.ones_like(base.row_energy())
        return {"m_out": _root(base.row_energy()), "m_in": _root(column_energy(base, [], one))}

    def gains(
        self, numbers: Numbers, base: BaseWeight, updates: Sequence[FactoredUpdate], constant: bool = True
    ) -> Gains:
        with _norms(constant):
            norms = _root(row_energy(base, updates))
        rows = numbers["m_out"] / norms
        with _norms(constant):
            columns = _root(column_energy(base, updates, rows))
        return Gains(rows, rows, numbers["m_in"] / columns)


class BaseAndUpdate(Magnitude):
    """`W' = α W / ‖W‖_F + β ΔW / ‖ΔW‖_F`: two trained numbers a module.

    Starts at `α = ‖W‖_F`, `β = 0` with an update that is not zero. The second norm has a floor of `1e-8 ‖W‖_F`,
    so that an update that passes through zero divides by nothing.

    Source: MAP, arXiv 2505.23094.
    """

    divides_by_update = True

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"alpha": (1,), "beta": (1,)}

    def init(self, base: BaseWeight) -> dict[str, Tensor]:
        alpha = _root(base.row_energy().sum(0, keepdim=True))
        return {"alpha": alpha, "beta": torch.zeros_like(alpha)}

    def gains(
        self, numbers: Numbers, base: BaseWeight, updates: Sequence[FactoredUpdate], constant: bool = True
    ) -> Gains:
        with _norms(constant):
            energy = base.row_energy().sum(0, keepdim=True)
            norm = _root(update_energy(updates) + 1e-16 * energy)
        return Gains(numbers["alpha"] / _root(energy), numbers["beta"] / norm)


def _norms(constant: bool) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(torch.is_grad_enabled() and not constant)


def _root(energy: Tensor) -> Tensor:
    return energy.clamp_min(_TINY).sqrt()


MAGNITUDES: dict[str, Magnitude] = {
    "none": NoMagnitude(),
    "per_output": PerOutput(),
    "per_output_and_input": PerOutputAndInput(),
    "base_and_update": BaseAndUpdate(),
}
