"""The adapted linear as one operation of a graph that takes no gradients: its order depends on sizes of each call."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import OPERATIONS
from .linear import PartOfLinear, Place, adapted_linear
from .orders import choose_order


def take(
    x: Tensor,  # (*n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,
    numbers: list[Tensor],
    places: list[int],
    asked: str,
) -> Tensor:  # (*n, out)
    """Return the adapted output in a graph.

    Args:
        x: Input of the module.
        W: Weight.
        bias: Bias, `(out,)`.
        numbers: `Vᵀ`, `C` with `σ` in it, and `U` of each part.
        places: First row, first column, blocks down and blocks across of each part.
        asked: The order that is asked for, see `orders`.
    """
    y: Tensor = torch.ops.lotr.adapted(x, W, bias, numbers, places, asked)
    return y


def _adapted_without_gradients(
    x: Tensor, W: Tensor, bias: Tensor | None, numbers: list[Tensor], places: list[int], asked: str
) -> Tensor:
    parts = [
        PartOfLinear(Place(row, column, (a, b)), *numbers[3 * n : 3 * n + 3])
        for n, (row, column, a, b) in enumerate(zip(*(places[m::4] for m in range(4)), strict=True))
    ]
    with torch.no_grad():
        order = choose_order(x.numel() // x.shape[-1], len(W), W.shape[1], W.dtype, asked, gradients=False)
        return adapted_linear(x, W, bias, parts, order)[0]


OPERATIONS.define(
    "adapted(Tensor x, Tensor W, Tensor? bias, Tensor[] numbers, int[] places, str asked) -> Tensor"
)
OPERATIONS.impl("adapted", _adapted_without_gradients, "CPU")
torch.library.register_fake(
    "lotr::adapted", lambda x, W, *_: x.new_empty(*x.shape[:-1], W.shape[0]), lib=OPERATIONS
)
