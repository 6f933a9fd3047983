"""The products of an adapted linear, on matrices: its output, and the gradients of all that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_product import and_times_V, base_output, gives_times_V
from .matmul import product
from .orders import Order
from .update import Factored, Grid


@dataclass(frozen=True)
class Place:
    """Where a part of the update stands in the weight.

    Args:
        row: First output feature.
        column: First input feature.
        grid: `(a, b)`, blocks down and across; `b > 1` only where the part covers all input features.
    """

    row: int
    column: int
    grid: Grid = (1, 1)


@dataclass(frozen=True)
class PartOfLinear:
    """A part of the update with its numbers.

    Args:
        place: Where it stands.
        Vt: Input factor, transposed, `(r, i)`.
        C: Cores side by side, times `σ`, `(a·k, b·r)`.
        U: Output factor, `(o, k)`.
        h: `x V` of this input, `(n, b·r)`, where another part has computed it.
    """

    place: Place
    Vt: Tensor
    C: Tensor
    U: Tensor
    h: Tensor | None = None


def times_V(X: Tensor, part: PartOfLinear) -> Tensor:  # (n, in) -> (n, b·r)
    """Return `h = X V` of a part, which may be known."""
    if part.h is not None:
        return part.h
    return rows_of(product(_across(X, part), part.Vt.T), part.place.grid[1] * part.Vt.shape[0])


def output(
    X: Tensor,  # (n, in)
    W: Tensor,
    bias: Tensor | None,
    parts: Sequence[PartOfLinear],
    hs: Sequence[Tensor | None],  # (n, b·r) each; nothing where the update is merged
    order: Order,
) -> tuple[Tensor, Tensor | None]:  # (n, out), (out, r)
    """Return the output: by the base weight and what is merged into it, or with the updates added to that.

    The second is `W V`, where it was asked for and came along.
    """
    if order.merge_forward:
        return base_output(X, _merged(W, parts), bias, parts), None
    if order.with_norms and gives_times_V(X, W, parts):
        Y, WV = and_times_V(X, W, bias, parts[0].Vt)
    else:
        Y, WV = base_output(X, W, bias, parts), None
    for part, product_of_input in zip(parts, hs, strict=True):
        h, o, a = _known(product_of_input), len(part.U), part.place.grid[0]
        block = _columns(Y, part.place.row, a * o)
        if a == 1 and len(h) < o:  # fewer tokens than features: the core goes to them
            block.addmm_(h @ part.C.T, part.U.T)
        else:
            block.addmm_(h, _factored(part).left().T)
    return Y, WV


def gradients(
    dY: Tensor | None,  # (n, out)
    dhs: Sequence[Tensor | None],  # (n, b·r) each, from others that took the product
    X: Tensor | None,  # (n, in), where a V trains
    W: Tensor,  # (out, in)
    parts: Sequence[PartOfLinear],
    given: Sequence[bool],
    order: Order,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of the input, and those of `Vᵀ`, `C`, `U` and `h` of each part.

    Args:
        dY: Gradient of the output.
        dhs: Gradients of the products `h` that others took.
        X: Input.
        W: Frozen weight.
        parts: The updates, with their `h` where a number trains.
        given: Whether the `h` of a part came from another, to which its gradient goes back.
        order: Which way the products are taken.
        needs: Whether a gradient is needed: of the input, and four for each part.
    """
    rest: list[tuple[Place, Tensor, Tensor]] = []  # what of dX is not in the product with the base
    own: list[PartOfLinear] = []  # what of dX can be, when the update is merged into it
    found: list[Tensor | None] = []
    for n, (part, dh) in enumerate(zip(parts, dhs, strict=True)):
        needs_V, needs_C, needs_U, needs_h = needs[1 + 4 * n : 5 + 4 * n]
        Vt, C, U, q, dC, dU = part.Vt, part.C, part.U, None, None, None
        if dY is not None:
            o, k = U.shape
            D = rows_of(_columns(dY, part.place.row, part.place.grid[0] * o), o)  # (n·a, o)
            p = rows_of(product(D, U), C.shape[0])  # (n, a·k)
            q = p @ C
            dC = p.T @ _known(part.h) if needs_C else None
            dU = product(D.T, rows_of(_known(part.h) @ C.T, k)) if needs_U else None
        if given[n]:
            found += [None, dC, dU, q if needs_h else None]
            continue
        dVt = None
        whole = q if dh is None else dh if q is None else q + dh
        if needs_V and whole is not None:
            dVt = product(_across(_known(X), part).T, rows_of(whole, Vt.shape[0])).T
        found += [dVt, dC, dU, None]
        if dY is not None and order.merge_backward:
            own.append(part)
            whole = dh
        if whole is not None:
            rest.append((part.place, Vt, whole))
    dX = _dX(dY, W, own, rest) if needs[0] and (dY is not None or rest) else None
    return dX, found


def _dX(
    dY: Tensor | None, W: Tensor, merged: list[PartOfLinear], rest: list[tuple[Place, Tensor, Tensor]]
) -> Tensor:  # (n, in)
    """Return the gradient of the input: with the base and what is merged into it, and the rest added to that."""
    if dY is not None:
        dX = product(dY, _merged(W, merged)).contiguous()
    else:
        _, Vt, q = rest[0]
        dX = q.new_zeros(len(q), W.shape[1])
    for place, Vt, q in rest:
        r, i = Vt.shape
        block = _columns(dX, place.column, i) if place.grid[1] == 1 else dX.view(-1, i)
        block.addmm_(rows_of(q, r), Vt)
    return dX


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _factored(part: PartOfLinear) -> Factored:
    return Factored(part.U, part.C, part.Vt.T, 1.0, part.place.grid)


def _across(X: Tensor, part: PartOfLinear) -> Tensor:  # (n·b, i)
    """Return what a part reads of the input, block by block."""
    b, i = part.place.grid[1], part.Vt.shape[1]
    return _columns(X, part.place.column, i) if b == 1 else rows_of(X, i)


# most parts cover their weight: a view that changes nothing costs as much as a small product
def _columns(X: Tensor, first: int, count: int) -> Tensor:
    return X if X.shape[1] == count else X.narrow(1, first, count)


def rows_of(X: Tensor, width: int) -> Tensor:  # (*n, m) -> (n', width)
    """Return a tensor as a matrix of so many columns."""
    return X if X.dim() == 2 and X.shape[1] == width else X.reshape(-1, width)


def _merged(W: Tensor, parts: Sequence[PartOfLinear]) -> Tensor:  # (out, in)
    """Return the base weight plus the updates."""
    if not parts:
        return W
    first, *others = parts
    L, b, i = _factored(first).left(), first.place.grid[1], first.Vt.shape[1]
    if (len(L), b * i) == W.shape and b == 1:
        merged = torch.addmm(W, L, first.Vt)
    else:
        merged, others = W.clone(), list(parts)
    for part in others:
        L = _factored(part).left()
        for n, block in enumerate(L.split(len(part.Vt), 1)):
            i = part.Vt.shape[1]
            rows = merged.narrow(0, part.place.row, len(L)).narrow(1, part.place.column + n * i, i)
            rows.addmm_(block, part.Vt)
    return merged
