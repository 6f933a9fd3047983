"""The adapted linear as an operation of a compiled graph, and one for its gradients; each call chooses its order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .linear_products import PartOfLinear, Place, gradients, output, times_V
from .matmul import OPERATIONS
from .orders import Order, choose_order

_PLACE = 5  # numbers that say where a part stands


def take(
    x: Tensor,  # (*n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,
    parts: Sequence[PartOfLinear],
    asked: str,
) -> Tensor:  # (*n, out)
    """Return the adapted output in a graph.

    Args:
        x: Input of the module.
        W: Frozen weight.
        bias: Bias, `(out,)`.
        parts: The updates; `h` is given where other modules take it too.
        asked: The order that is asked for, see `orders`.
    """
    numbers = [tensor for part in parts for tensor in (part.Vt, part.C, part.U)]
    products = [part.h for part in parts if part.h is not None]
    places = [
        number
        for part in parts
        for number in (part.place.row, part.place.column, *part.place.grid, int(part.h is not None))
    ]
    with_gradients = torch.is_grad_enabled()
    found: list[Tensor] = torch.ops.lotr.adapted(x, W, bias, numbers, products, places, asked, with_gradients)
    return found[0]


def _adapted(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    numbers: list[Tensor],
    products: list[Tensor],
    places: list[int],
    asked: str,
    with_gradients: bool,
) -> list[Tensor]:
    """Return the output, and where gradients will be taken the products `h` that were not given."""
    given = _given(places)
    known = iter(products)
    parts = _parts(places, numbers, [next(known) if is_given else None for is_given in given])
    X = x.reshape(-1, W.shape[1])
    order = choose_order(len(X), len(W), W.shape[1], W.dtype, asked, with_gradients)
    with torch.no_grad():
        hs = [times_V(X, part) if with_gradients or not order.merge_forward else None for part in parts]
        Y, _ = output(X, W, bias, parts, hs, order)
    own = compress(hs, (with_gradients and not is_given for is_given in given))
    return [Y.view(*x.shape[:-1], len(W)), *(h for h in own if h is not None)]


def _like_adapted(x: Tensor, W: Tensor, bias: Any, numbers: list[Tensor], *rest: Any) -> list[Tensor]:
    _, places, _, with_gradients = rest
    y = x.new_empty(*x.shape[:-1], W.shape[0])
    widths = (b * len(Vt) for Vt, b in zip(numbers[::3], places[3::_PLACE], strict=True))
    own = compress(widths, (with_gradients and not is_given for is_given in _given(places)))
    return [y, *(x.new_empty(x.numel() // x.shape[-1], width) for width in own)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, W, _, numbers, products, ctx.places, ctx.asked, _ = inputs
    own, known = iter(output[1:]), iter(products)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W, *numbers, *(next(known if g else own) for g in _given(ctx.places)))


def _gradients_of_adapted(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
    given = _given(ctx.places)
    x, W, *saved = ctx.saved_tensors
    numbers, hs = saved[: 3 * len(given)], saved[3 * len(given) :]
    needs_x, _, needs_bias, needs_numbers, needs_products, *_ = ctx.needs_input_grad
    of_products, (dy, *of_own) = iter(needs_products), dys
    needs, own = [needs_x, needs_bias], iter(of_own)
    for n, is_given in enumerate(given):
        needs_V, *others = needs_numbers[3 * n : 3 * n + 3]
        # to V where it was multiplied here, or to `h` where that was given
        needs += [needs_V and not is_given, *others, is_given and next(of_products)]
    dhs = [None if is_given else next(own) for is_given in given]
    said = (x if any(needs[2::4]) else None, W, numbers, hs, ctx.places, ctx.asked, needs)
    # gradients that are differentiated, or differentiate gradients, are steps of their own
    if dy is None or torch.is_grad_enabled() or any(dh is not None for dh in dhs):
        every = _every(dy, dhs, *said)
    else:
        found = iter(torch.ops.lotr.adapted_gradients(dy, *said))
        every = [next(found) if needed else None for needed in needs]
    dX, dbias, *rest = every
    dx = None if dX is None else dX.view(x.shape)
    of_numbers = [gradient for n, gradient in enumerate(rest) if n % 4 != 3]
    return dx, None, dbias, of_numbers, list(compress(rest[3::4], given)), None, None, None


def _every(
    dy: Tensor | None,
    dhs: Sequence[Tensor | None],
    x: Tensor | None,
    W: Tensor,
    numbers: list[Tensor],
    hs: list[Tensor],
    places: list[int],
    asked: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of input (as a matrix) and bias, and of `Vᵀ`, `C`, `U` and `h` of each part, as needed."""
    needs_x, needs_bias, *of_parts = needs
    X = None if x is None else x.reshape(-1, W.shape[1])
    dY = None if dy is None else dy.reshape(-1, len(W))
    order = Order() if dY is None else choose_order(len(dY), len(W), W.shape[1], W.dtype, asked)
    parts, given = _parts(places, numbers, hs), _given(places)
    dX, found = gradients(dY, dhs, X, W, parts, given, order, [needs_x, *of_parts])
    return [dX, dY.sum(0) if dY is not None and needs_bias else None, *found]


def _adapted_gradients(dy: Tensor, *said: Any) -> list[Tensor]:
    _, _, _, hs, *_ = said
    with torch.no_grad():
        every = _every(dy, [None] * len(hs), *said)
    return [gradient.contiguous() for gradient in every if gradient is not None]


def _like_gradients(
    dy: Tensor, x: Any, W: Tensor, numbers: list[Tensor], hs: list[Tensor], *rest: Any
) -> list[Tensor]:
    _, _, needs = rest
    like = [dy.new_empty(dy.numel() // len(W), W.shape[1]), W.new_empty(len(W))]
    for n, h in enumerate(hs):
        like += [*numbers[3 * n : 3 * n + 3], h]
    return [tensor.new_empty(tensor.shape) for tensor in compress(like, needs)]


def _parts(places: list[int], numbers: list[Tensor], hs: Sequence[Tensor | None]) -> list[PartOfLinear]:
    grouped = zip(*(places[n::_PLACE] for n in range(4)), strict=True)
    each = zip(numbers[::3], numbers[1::3], numbers[2::3], hs, strict=True)
    return [
        PartOfLinear(Place(row, column, (a, b)), *of_part)
        for (row, column, a, b), of_part in zip(grouped, each, strict=True)
    ]


def _given(places: list[int]) -> list[bool]:
    return [bool(given) for given in places[4::_PLACE]]


OPERATIONS.define(
    "adapted(Tensor x, Tensor W, Tensor? bias, Tensor[] numbers, Tensor[] products, int[] places, str asked, "
    "bool gradients) -> Tensor[]"
)
OPERATIONS.define(
    "adapted_gradients(Tensor dy, Tensor? x, Tensor W, Tensor[] numbers, Tensor[] hs, int[] places, str asked, "
    "bool[] needs) -> Tensor[]"
)
OPERATIONS.impl("adapted", _adapted, "CPU")
OPERATIONS.impl("adapted_gradients", _adapted_gradients, "CPU")
torch.library.register_fake("lotr::adapted", _like_adapted, lib=OPERATIONS)
torch.library.register_fake("lotr::adapted_gradients", _like_gradients, lib=OPERATIONS)
torch.library.register_autograd("lotr::adapted", _gradients_of_adapted, setup_context=_keep, lib=OPERATIONS)
