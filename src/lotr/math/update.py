"""The formula of the library: `ΔW_s = σ · U · C_s · Vᵀ`.

| symbol | shape | meaning |
|---|---|---|
| `W`   | `(out, in)` | a frozen pre-trained weight |
| `U`   | `(o, k)` | output factor, shared by the sites of a group |
| `V`   | `(i, r)` | input factor, shared by the sites of a group |
| `C_s` | `(k, r)` | core of site `s` |
| `C`   | `(a·k, b·r)` | cores of a grid of `a × b` sites, side by side as their blocks are; `a = b = 1`: `C_s` |
| `σ`   | scalar | scaling, multiplies the update |
| `n`   | | tokens, any number of leading axes |

`o` and `i` are the features of a site's block: the whole weight's, unless the weight is cut into blocks.

Forward, merge and export all call this file. Beside it `fused_linear.py` multiplies for one function of autograd, and
`stacked_weight.py` for the experts of one parameter; each is tested against the dense product.
Source: LoTR, arXiv 2402.01376.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]
Grid = tuple[int, int]


def apply(
    x: Tensor,  # (*n, b·i)
    input_factor: LinearMap,  # (*n, i) -> (*n, r), multiplies by V
    core: LinearMap,  # (*n, b·r) -> (*n, a·k), multiplies by Cᵀ
    output_factor: LinearMap,  # (*n, k) -> (*n, o), multiplies by Uᵀ
    scaling: float | Tensor,
    grid: Grid = (1, 1),
) -> Tensor:  # (*n, a·o)
    """Apply an update to activations without building `ΔW`: `σ · U (C (Vᵀ x))`.

    The factors are maps rather than tensors, because a shared factor may have to be called as a module
    (sharded or offloaded weights exist only during that call). The scaling acts where rows are shortest.

    Args:
        x: Input of the adapted module, shape `(*n, b·i)`.
        input_factor: Map `(*n, i) -> (*n, r)`.
        core: Map `(*n, b·r) -> (*n, a·k)`.
        output_factor: Map `(*n, k) -> (*n, o)`.
        scaling: `σ`, no unit.
        grid: `(a, b)`, blocks down and across.

    Returns:
        `x · ΔWᵀ`, shape `(*n, a·o)`.

    Example:
        >>> import torch
        >>> U, C, V = torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3)
        >>> x = torch.randn(4, 5)
        >>> apply(x, lambda x: x @ V, lambda h: h @ C.T, lambda h: h @ U.T, 1.0).shape
        torch.Size([4, 6])
    """
    a, b = grid
    h = input_factor(x) if b == 1 else input_factor(x.unflatten(-1, (b, -1))).flatten(-2)
    h = core(h) * scaling
    return output_factor(h) if a == 1 else output_factor(h.unflatten(-1, (a, -1))).flatten(-2)


def side_by_side(
    cores: Tensor,  # (*extents, k, r), a·b cores in the order of their blocks
    grid: Grid,
) -> Tensor:  # (a·k, b·r)
    """Lay the cores of a grid of blocks side by side.

    Example:
        >>> import torch
        >>> side_by_side(torch.randn(4, 2, 3), grid=(4, 1)).shape, side_by_side(torch.randn(4, 2, 3), (2, 2)).shape
        (torch.Size([8, 3]), torch.Size([4, 6]))
    """
    a, b = grid
    k, r = cores.shape[-2:]
    return cores.reshape(a, b, k, r).transpose(1, 2).reshape(a * k, b * r)


def one_by_one(
    C: Tensor,  # (a·k, b·r)
    grid: Grid,
) -> Tensor:  # (a·b, k, r)
    """Return the cores of a grid of blocks, which lie side by side, in the order of their blocks.

    Example:
        >>> import torch
        >>> one_by_one(torch.randn(8, 3), grid=(4, 1)).shape
        torch.Size([4, 2, 3])
    """
    a, b = grid
    k, r = C.shape[0] // a, C.shape[1] // b
    return C.reshape(a, k, b, r).transpose(1, 2).reshape(a * b, k, r)


def scaled(C: Tensor, scaling: float | Tensor) -> Tensor:
    """Return `σ C`; with `σ = 1`, the default, the cores as they are, without a pass and a step of autograd."""
    return C if isinstance(scaling, (int, float)) and scaling == 1 else C * scaling


@dataclass(frozen=True)
class FactoredUpdate:
    """The update of one part of a weight: `ΔW = left · (I_b ⊗ V)ᵀ` with `left = σ (I_a ⊗ U) C`, and its position.

    Args:
        U: Output factor, shape `(o, k)`.
        C: Cores side by side, shape `(a·k, b·r)`.
        V: Input factor, shape `(i, r)`.
        scaling: `σ`, no unit.
        grid: `(a, b)`, blocks down and across.
        first_row: First output feature of the weight that the part covers.
        first_column: First input feature.

    Example:
        >>> import torch
        >>> update = FactoredUpdate(torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3), 1.0)
        >>> update.dense().shape, [matrix.shape for matrix in update.as_lora()]
        (torch.Size([6, 5]), [torch.Size([2, 5]), torch.Size([6, 2])])
    """

    U: Tensor
    C: Tensor
    V: Tensor
    scaling: float | Tensor
    grid: Grid = (1, 1)
    first_row: int = 0
    first_column: int = 0

    @property
    def rows(self) -> slice:
        """Output features that the part covers."""
        return slice(self.first_row, self.first_row + self.grid[0] * self.U.shape[0])

    @property
    def columns(self) -> slice:
        """Input features that the part covers."""
        return slice(self.first_column, self.first_column + self.grid[1] * self.V.shape[0])

    def left(self) -> Tensor:  # (a·o, b·r)
        """Return `σ (I_a ⊗ U) C`."""
        C, a = scaled(self.C, self.scaling), self.grid[0]
        if a == 1:
            return self.U @ C
        across = C.unflatten(0, (a, -1)).transpose(0, 1).flatten(1)  # (k, a·b·r), for one product
        return (self.U @ across).unflatten(1, (a, -1)).transpose(0, 1).flatten(0, 1)

    def dense(self) -> Tensor:  # (a·o, b·i)
        """Build `ΔW`, for merging and for checks."""
        return (self.left().unflatten(1, (self.grid[1], -1)) @ self.V.T).flatten(1)

    def as_lora(self) -> tuple[Tensor, Tensor]:  # (q, b·i), (a·o, q)
        """Write the update as the two matrices of plain LoRA, exactly: `ΔW = B · A`, of rank `q = min(a·k, b·r)`.

        The cores are multiplied into the side that leaves the smaller rank; no decomposition is needed.

        Returns:
            `A` of shape `(q, b·i)` and `B` of shape `(a·o, q)`; `σ` is in them, so LoRA's `alpha / r` is one.
        """
        a, b = self.grid
        if self.C.shape[1] <= self.C.shape[0]:
            return torch.block_diag(*[self.V.T] * b), self.left()
        C = scaled(self.C, self.scaling).unflatten(1, (b, -1))  # (a·k, b, r)
        return (C @ self.V.T).flatten(1), torch.block_diag(*[self.U] * a)


def loras_of(
    updates: Sequence[FactoredUpdate],
    shape: tuple[int, int],
    experts: int = 0,
) -> list[tuple[Tensor, Tensor]]:  # (q, in), (out, q)
    """Write the parts of one weight as plain LoRA, exactly; the ranks of parts that cover the same rows add up.

    Args:
        updates: The parts.
        shape: Features `(out, in)` of the weight; `(experts · out, in)` of a stack of experts.
        experts: How many experts it stacks, each of which gets a LoRA; `0`: it is one matrix.

    Returns:
        `A` of shape `(q, in)` and `B` of shape `(out, q)` for every expert, or for the one matrix.
    """
    (height, width), count = shape, max(experts, 1)
    As: list[list[Tensor]] = [[] for _ in range(count)]
    Bs: list[list[Tensor]] = [[] for _ in range(count)]
    for update in updates:
        A, B = update.as_lora()
        rows, columns = update.rows, update.columns
        A = F.pad(A, (columns.start, width - columns.stop))
        blocks = F.pad(B, (0, 0, rows.start, height - rows.stop)).unflatten(0, (count, -1))
        for expert in range(rows.start * count // height, -(-rows.stop * count // height)):
            As[expert].append(A)
            Bs[expert].append(blocks[expert])
    return [(torch.cat(A), torch.cat(B, 1)) for A, B in zip(As, Bs, strict=True)]
