"""What one adapter has at one module: its parts, their numbers, its magnitude."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..math import update as delta
from ..math.magnitude import Gains, Magnitude
from ..math.norms import Placed
from ..math.update import LinearMap
from ..sharing.parts import Part
from . import direct
from .group import LotrGroup, weight_of

if TYPE_CHECKING:
    from .layer import LotrLinear


@dataclass
class Member:
    """A part of a module, and the group that it takes part in."""

    part: Part
    group: LotrGroup


@dataclass
class SiteState:
    """What a layer keeps of an adapter beside its numbers. It does not refer to the layer: no reference cycles."""

    members: tuple[Member, ...]
    magnitude: Magnitude
    dropout: float = 0.0
    norm_gradient: bool = False
    order: str = "auto"


@dataclass
class Adapted:
    """One adapter at one module: made when it is used, from the layer and what the layer keeps.

    The numbers live in modules that PEFT saves and moves; wrappers replace those, so they are looked up each time.
    """

    layer: LotrLinear
    adapter: str
    state: SiteState
    #: `W V` of the one part of the module, `(out, r)`, where the output gave it.
    WV: Tensor | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """The parts of the module."""
        return self.state.members

    @property
    def magnitude(self) -> Magnitude:
        """Rule on the whole weight."""
        return self.state.magnitude

    def update(self, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
        """Return the update of the output, before the magnitude."""
        x = self.layer._cast_input_dtype(x, self.members[0].group.lotr_V[self.adapter].weight.dtype)
        dropout = self.state.dropout
        x = F.dropout(x, dropout, self.layer.training) if dropout else x
        outputs: dict[int, Tensor] = {}  # first row → the sum of what covers those rows
        for member in self.members:
            part, group = member.part, member.group
            start, width = part.columns
            output = delta.apply(
                x if width == self.layer.in_features else x.narrow(-1, start, width),
                partial(_call, group.lotr_V[self.adapter]),
                self._core_map(member),
                partial(_call, group.lotr_U[self.adapter]),
                self.layer.scaling[self.adapter],
                part.grid,
            )
            row = part.rows[0]
            outputs[row] = outputs[row] + output if row in outputs else output
        parts = [outputs[row] for row in sorted(outputs)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def gains(self) -> Gains:
        """Return what the magnitude does, from the factors as they are now."""
        numbers = self.layer.lotr_magnitude[self.adapter]()
        kind = next(iter(numbers.values())).device.type
        # norms in half precision would be coarse; on the meta device there is no autocast
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            update = [self.placed(member) for member in self.members]
            base = self.layer.base_weight.read_once()
            return self.magnitude.gains(numbers, base, update, constant=not self.state.norm_gradient)

    def site_core(self, part: Part) -> Tensor:  # (a·k, b·r)
        """Return the cores of a part that are kept with the layer."""
        held = self.layer.lotr_C[self.adapter]
        return held()[part.name] if part.name else weight_of(held)

    def placed(self, member: Member) -> Placed:
        """Return a part of the update with its numbers, in float32 or wider, where the module is."""
        part, group = member.part, member.group
        U, Vt = weight_of(group.lotr_U[self.adapter]), weight_of(group.lotr_V[self.adapter])
        # a group may span devices; with an offloaded base everything is where the factors are
        home = U.device if self.layer.home.type == "meta" else self.layer.home
        wide = torch.float64 if U.dtype == torch.float64 else torch.float32
        U, C, V = (tensor.to(home, wide) for tensor in (U, self.core(member), Vt.T))
        update = delta.Factored(U, C, V, self.layer.scaling[self.adapter], part.grid)
        return Placed(update, part.rows[0], part.columns[0], group.frozen(self.adapter), self.WV)

    def core(self, member: Member) -> Tensor:  # (a·k, b·r)
        """Return the cores of a part, side by side."""
        part, shared = member.part, member.group.lotr_core
        if part.group.core.is_identity:
            U = member.group.lotr_U[self.adapter].weight
            return torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        if part.group.core.by_site:
            return self.site_core(part)
        numbers = shared[self.adapter]() if self.adapter in shared else {}
        kind = next((t.device.type for t in numbers.values()), "meta")
        # autocast would turn some of these small products to another type, and not others
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            return delta.side_by_side(part.group.core.block(numbers, part.region), part.grid)

    def _core_map(self, member: Member) -> LinearMap:
        core = member.part.group.core
        current = member.group.rows.get(self.adapter)  # of a bank's adapter
        rows = None if current is None else current.get()
        if rows is not None:
            return rows.core(member.part)
        if core.is_identity:
            return _unchanged
        if core.by_site and not member.part.name:
            module: LinearMap = self.layer.lotr_C[self.adapter]
            return module
        C = self.core(member)
        return lambda h: F.linear(h, C.to(h.device))


def _call(factor: nn.Linear, x: Tensor) -> Tensor:
    # sharded and offloaded weights exist only while their module runs, so the module is called; a group
    # may span devices, and only then its weight is brought to the activations
    y = direct.factor_in_graph(factor, x)
    if y is not None:
        return y
    weight = factor.weight
    if weight.device == x.device or weight.device.type == "meta" or hasattr(factor, "_hf_hook"):
        return factor(x)
    return F.linear(x, weight.to(x.device))


def _unchanged(x: Tensor) -> Tensor:
    return x
