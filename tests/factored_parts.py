"""Updates that stand somewhere in a weight of 12 × 10, and the dense matrix that they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lotr.math.update import FactoredUpdate, Grid

OUT, IN = 12, 10
#: Name → first row, first column, height, width and grid of every part.
LAYOUTS: dict[str, list[tuple[int, int, int, int, Grid]]] = {
    "one part": [(0, 0, 12, 10, (1, 1))],
    "one part of a grid": [(0, 0, 12, 10, (3, 2))],
    "rows are split": [(0, 0, 4, 10, (1, 1)), (4, 0, 6, 10, (2, 1)), (10, 0, 2, 10, (1, 1))],
    "columns are split": [(0, 0, 12, 4, (1, 2)), (0, 4, 12, 6, (1, 1))],
    "both are split": [
        (0, 0, 8, 6, (2, 1)),
        (0, 6, 8, 4, (1, 1)),
        (8, 0, 4, 6, (1, 3)),
        (8, 6, 4, 4, (2, 2)),
    ],
    "rows are left out": [(0, 0, 4, 10, (1, 1)), (8, 0, 4, 10, (1, 1))],
    "columns are left out": [(0, 2, 12, 6, (2, 3))],
    "no part": [],
}


def place(
    layout: str, dtype: torch.dtype = torch.float64, frozen: bool = False, zero: bool = False
) -> list[FactoredUpdate]:
    """Return the parts of a layout with random numbers that take gradients; at `zero` every core is."""
    parts = []
    for row, column, height, width, (a, b) in LAYOUTS[layout]:
        k, r = 2, 1 if width // b < 3 else 3
        shapes = (height // a, k), (a * k, b * r), (width // b, r)
        U, C, V = (torch.randn(shape, dtype=dtype) for shape in shapes)
        C = torch.zeros_like(C) if zero else C
        trained = (U.requires_grad_(), C.requires_grad_(), V.requires_grad_(not frozen))
        parts.append(FactoredUpdate(*trained, 0.5, (a, b), row, column))
    return parts


def leaves(parts: list[FactoredUpdate]) -> list[Tensor]:
    """Return the numbers of the parts that take gradients."""
    numbers = [number for part in parts for number in (part.U, part.C, part.V)]
    return [number for number in numbers if number.requires_grad]


def dense(parts: list[FactoredUpdate], dtype: torch.dtype = torch.float64) -> Tensor:  # (OUT, IN)
    """Return the whole update by the definition of its blocks."""
    whole = torch.zeros(OUT, IN, dtype=dtype)
    for part in parts:
        U, C, V = (number.to(dtype) for number in (part.U, part.C, part.V))
        (a, b), k, r = part.grid, U.shape[1], V.shape[1]
        blocks = torch.einsum("ok,akbr,ir->aobi", U, C.reshape(a, k, b, r), V) * part.scaling
        block = blocks.reshape(a * len(U), b * len(V))
        below, right = OUT - part.first_row - len(block), IN - part.first_column - block.shape[1]
        whole = whole + torch.nn.functional.pad(block, (part.first_column, right, part.first_row, below))
    return whole
