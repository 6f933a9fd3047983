"""Norms of `W + ΔW` in factored form: rows, columns, and of the update alone. `ΔW` is never built.

With `L = σ (I_a ⊗ U) C` of shape `(a·o, b·r)`, an update is `ΔW = L (I_b ⊗ V)ᵀ`, so that

    ‖row‖²    = ‖W‖²_row + rowsum((2 W V + L VᵀV) ∘ L)
    ‖column‖² = ‖W‖²_column + 2 rowsum((Wᵀ L) ∘ V) + rowsum((V LᵀL) ∘ V)
    ‖ΔW‖²     = sum((L VᵀV) ∘ L)

Everything is computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .matmul import product
from .update import Factored

_CHUNK = 1 << 22  # numbers of a weight that are squared at a time


@dataclass(frozen=True)
class Frozen:
    """A `V` that stays as it is.

    Args:
        adapter: Whose it is.
        V: The tensor itself, so that no other takes its address; None while a graph is compiled.
        state: What differs once it has been written to.
    """

    adapter: str
    V: Tensor | None = None
    state: Hashable = None

    def is_still(self, other: Frozen | None) -> bool:
        """Whether another is the same tensor with the same numbers."""
        return other is not None and self.V is other.V and self.state == other.state


@dataclass(frozen=True)
class Placed:
    """A part of an update, and where in the weight it stands.

    Args:
        update: The part in factored form.
        row: First output feature.
        column: First input feature.
        frozen: What tells this `V` from any other, when it stays as it is: `W V` is kept with it.
        WV: `W V` at this place, `(a·o, r)`, where it is known.
    """

    update: Factored
    row: int
    column: int
    frozen: Frozen | None = None
    WV: Tensor | None = None

    @property
    def rows(self) -> slice:
        """Output features that the part covers."""
        return slice(self.row, self.row + self.update.grid[0] * self.update.U.shape[0])

    @property
    def columns(self) -> slice:
        """Input features that the part covers."""
        return slice(self.column, self.column + self.update.grid[1] * self.update.V.shape[0])


@contextmanager
def _for_good() -> Iterator[None]:
    """Compute what outlives the call: a tensor of inference mode could not take part in training later."""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    with torch.no_grad(), torch.inference_mode(False) if inference else nullcontext():
        yield


def _never_changes() -> object:
    return 0


@dataclass
class Kept:
    """What of a weight never changes, and the version of the weight that it belongs to."""

    tensors: dict[Hashable, Tensor] = field(default_factory=dict)
    of: dict[Hashable, Frozen] = field(default_factory=dict)
    seen: object = None


@dataclass
class BaseWeight:
    """A frozen weight and what of it never changes: `‖W‖²_row`, and `W V` for a frozen `V`.

    Args:
        weight: Returns `W`, shape `(out, in)`, of any floating type; called only when it is needed.
        version: Returns something that differs once `W` is another tensor or has been written to.
        kept: Where it is kept.
    """

    weight: Callable[[], Tensor]
    version: Callable[[], object] = _never_changes
    kept: Kept = field(default_factory=Kept, repr=False)

    def row_energy(self) -> Tensor:  # (out,)
        """Return `‖W‖²_row`, from memory after the first time."""
        self._forget_another()
        if "rows" in self.kept.tensors:
            return self.kept.tensors["rows"]
        with _for_good():
            W = self.weight()
            energy = _squares(W.detach(), 1, torch.ones(W.shape[1], device=W.device))
        if not energy.is_meta:
            self.kept.tensors["rows"] = energy
        return energy

    def times(self, part: Placed) -> Tensor:  # (a·o, b·r)
        """Return `W (I_b ⊗ V)` at the place of a part, from memory where `V` is frozen."""
        if part.WV is not None:
            return _wide(part.WV)
        self._forget_another()
        if part.frozen is None:
            return self._product(part)
        key = ("WV", part.row, part.column, part.frozen.adapter)
        if key not in self.kept.tensors or not part.frozen.is_still(self.kept.of.get(key)):
            with _for_good():
                self.kept.tensors[key] = self._product(part)
            self.kept.of[key] = part.frozen
        return self.kept.tensors[key]

    def _product(self, part: Placed) -> Tensor:
        V = _wide(part.update.V)
        W = self.weight().detach()[part.rows, part.columns].to(V)
        b = part.update.grid[1]
        return product(W, V) if b == 1 else (W.unflatten(1, (b, -1)) @ V).flatten(1)

    def forget(self, adapter: str) -> None:
        """Drop what is kept for an adapter."""
        for key in [key for key, frozen in self.kept.of.items() if frozen.adapter == adapter]:
            del self.kept.of[key]
            self.kept.tensors.pop(key, None)

    def read_once(self) -> BaseWeight:
        """Return the same weight, for one use: it is read, or dequantised, once at most."""
        read: list[Tensor] = []

        def weight() -> Tensor:
            if not read:
                read.append(self.weight())
            return read[0]

        self._forget_another()
        return replace(self, weight=weight, version=lambda: self.kept.seen)

    def moved(self, same: bool, device: torch.device) -> None:
        """Say that the weight was moved: what is kept goes along, or is dropped when it is not the same any more.

        Computed anew on another device, a norm could differ in its last bit from the trained number that started at
        it.
        """
        kept = self.kept.tensors if same and self.kept.seen is not None else {}
        self.kept.tensors = {name: tensor.to(device) for name, tensor in kept.items()}
        self.kept.seen = self.version()

    def _forget_another(self) -> None:
        """Drop what is kept once the weight has changed."""
        if torch.compiler.is_compiling():  # addresses and versions exist only when run
            return
        version = self.version()
        if version != self.kept.seen:
            self.kept.tensors.clear()
            self.kept.seen = version


def row_energy(base: BaseWeight, update: Sequence[Placed]) -> Tensor:  # (out,)
    """Return the squared norms of the rows of `W + ΔW`."""
    energy = base.row_energy()
    for part in update:
        L = _wide(part.update.left())
        V = _wide(part.update.V)
        blocks = L.reshape(-1, V.shape[1])  # (a·o·b, r)
        cross = base.times(part).to(blocks).reshape(blocks.shape)
        here = torch.addmm(cross, blocks, V.T @ V, beta=2).mul(blocks).reshape(L.shape).sum(1)
        energy = energy + _within(here, part.row, len(energy))
    return energy


def column_energy(base: BaseWeight, update: Sequence[Placed], rows: Tensor) -> Tensor:  # (in,)
    """Return the squared norms of the columns of `diag(rows) (W + ΔW)`."""
    W, weights = base.weight(), rows.square()
    energy = _squares(W, 0, weights)
    for part in update:
        b = part.update.grid[1]
        L, V = _wide(part.update.left()), _wide(part.update.V)
        D = L * weights[part.rows, None].to(L)
        L, D = L.unflatten(1, (b, -1)).movedim(1, 0), D.unflatten(1, (b, -1)).movedim(1, 0)  # (b, a·o, r)
        cross = W[part.rows, part.columns].to(V).unflatten(1, (b, -1)).permute(1, 2, 0) @ D  # (b, i, r)
        here = (2 * cross * V + (V @ (L.mT @ D)) * V).sum(-1).flatten()
        energy = energy + _within(here, part.column, len(energy))
    return energy


def update_energy(update: Sequence[Placed]) -> Tensor:  # (1,)
    """Return `‖ΔW‖²_F`."""
    parts = [_inner(_wide(part.update.left()), part).sum() for part in update]
    return torch.stack(parts).sum(0, keepdim=True)


def _inner(L: Tensor, part: Placed) -> Tensor:  # (a·o, b·r) -> (a·o, b·r)
    """Return `(L VᵀV) ∘ L`, whose row sums are the squared norms of the update's rows."""
    V = _wide(part.update.V)
    blocks = L.unflatten(1, (part.update.grid[1], -1))
    return ((blocks @ (V.T @ V)) * blocks).flatten(1)


def _within(values: Tensor, start: int, size: int) -> Tensor:  # (size,)
    if len(values) == size:
        return values
    return torch.nn.functional.pad(values, (start, size - start - len(values)))


def _squares(W: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Return the sums of `W²` along an axis, weighed, without a wide copy of the whole weight."""
    chunk = max(1, _CHUNK // W.shape[1])
    parts = []
    for start in range(0, W.shape[0], chunk):
        squares = _wide(W[start : start + chunk]).square()
        weighed = weights if axis == 1 else weights[start : start + chunk]
        parts.append(squares @ weighed.to(squares) if axis == 1 else weighed.to(squares) @ squares)
    return torch.cat(parts) if axis == 1 else torch.stack(parts).sum(0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
