"""Norms of `W + ΔW` in factored form: rows, columns, and of the update alone. `ΔW` is never built.

With `L = σ (I_a ⊗ U) C` of shape `(a·o, b·r)`, an update is `ΔW = L (I_b ⊗ V)ᵀ`, so that

    ‖row‖²    = ‖W‖²_row + rowsum((2 W V + L VᵀV) ∘ L)
    ‖column‖² = ‖W‖²_column + 2 rowsum((Wᵀ L) ∘ V) + rowsum((V LᵀL) ∘ V)
    ‖ΔW‖²     = sum((L VᵀV) ∘ L)

Everything is computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import product
from .update import FactoredUpdate

_CHUNK = 1 << 22  # numbers of a weight that are squared at a time


@dataclass
class BaseWeight:
    """A frozen weight, and the squared norms of its rows, which are computed once.

    Args:
        read: Returns `W`, shape `(out, in)`, of any floating type; called only when it is needed.
        cache: Where the norms are kept. Whoever changes the weight clears it.
    """

    read: Callable[[], Tensor]
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def row_energy(self) -> Tensor:  # (out,)
        """Return `‖W‖²_row`, from the cache after the first time."""
        if "row_energy" not in self.cache:
            # a tensor of inference mode could not take part in training later
            with torch.inference_mode(False), torch.no_grad():
                W = self.read().detach()
                energy = _squares(W, 1, torch.ones(W.shape[1], device=W.device))
            if energy.is_meta:
                return energy
            self.cache["row_energy"] = energy
        return self.cache["row_energy"]


def row_energy(base: BaseWeight, updates: Sequence[FactoredUpdate]) -> Tensor:  # (out,)
    """Return the squared norms of the rows of `W + ΔW`."""
    energy = base.row_energy()
    if not updates:
        return energy
    W = base.read().detach()
    for update in updates:
        L, V, b = _wide(update.left()), _wide(update.V), update.grid[1]
        here = W[update.rows, update.columns].to(V)
        cross = product(here, V) if b == 1 else (here.unflatten(1, (b, -1)) @ V).flatten(1)  # (a·o, b·r)
        blocks = L.reshape(-1, V.shape[1])  # (a·o·b, r)
        both = torch.addmm(cross.reshape(blocks.shape).to(blocks), blocks, V.T @ V, beta=2)
        energy = energy + _padded((both * blocks).reshape(L.shape).sum(1), update.first_row, len(energy))
    return energy


def column_energy(base: BaseWeight, updates: Sequence[FactoredUpdate], rows: Tensor) -> Tensor:  # (in,)
    """Return the squared norms of the columns of `diag(rows) (W + ΔW)`."""
    W, weights = base.read(), rows.square()
    energy = _squares(W, 0, weights)
    for update in updates:
        b = update.grid[1]
        L, V = _wide(update.left()), _wide(update.V)
        D = L * weights[update.rows, None].to(L)
        L, D = L.unflatten(1, (b, -1)).movedim(1, 0), D.unflatten(1, (b, -1)).movedim(1, 0)  # (b, a·o, r)
        cross = W[update.rows, update.columns].to(V).unflatten(1, (b, -1)).permute(1, 2, 0) @ D  # (b, i, r)
        here = (2 * cross * V + (V @ (L.mT @ D)) * V).sum(-1).flatten()
        energy = energy + _padded(here, update.first_column, len(energy))
    return energy


def update_energy(updates: Sequence[FactoredUpdate]) -> Tensor:  # (1,)
    """Return `‖ΔW‖²_F`."""
    energies = []
    for update in updates:
        V = _wide(update.V)
        blocks = _wide(update.left()).unflatten(1, (update.grid[1], -1))
        energies.append(((blocks @ (V.T @ V)) * blocks).sum())
    return torch.stack(energies).sum(0, keepdim=True)


def _padded(values: Tensor, first: int, size: int) -> Tensor:  # (size,)
    return values if len(values) == size else F.pad(values, (first, size - first - len(values)))


def _squares(W: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Return the sums of `W²` along an axis, weighed, without a wide copy of the whole weight."""
    sums = []
    chunk = max(1, _CHUNK // W.shape[1])
    for start in range(0, W.shape[0], chunk):
        squares = _wide(W[start : start + chunk]).square()
        weighed = (weights if axis == 1 else weights[start : start + chunk]).to(squares)
        sums.append(squares @ weighed if axis == 1 else weighed @ squares)
    return torch.cat(sums) if axis == 1 else torch.stack(sums).sum(0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
