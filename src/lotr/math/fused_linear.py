"""The adapted linear as one step of autograd: `y = x Wᵀ + b + Σ (x V) Cᵀ Uᵀ`, with `σ` in `C`.

What plain autograd would do in passes of its own over whole activations happens in the products of the base layer:
the update is added into the base's output, and its share of the input's gradient into the base's. Saved for the way
back is the input where `V` trains, and `h = x V`, which is as wide as the rank; with frozen factors `h` alone.

`h` is a second output: another part that shares `V` and reads the same input takes it, and its gradient comes back
here, so that `V` is multiplied once on the way forward, and once on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .linear_products import PartOfLinear, Place, gradients, output, rows_of, times_V
from .orders import Order


def adapted_linear(
    x: Tensor,  # (*n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    parts: Sequence[PartOfLinear],
    order: Order,
) -> tuple[Tensor, list[Tensor | None]]:  # (*n, out), (n, b·r) each
    """Return `x Wᵀ + bias` plus the updates of all parts, and products that others can use.

    Args:
        x: Input of the module.
        W: Frozen weight.
        bias: Bias, frozen or not.
        parts: The updates.
        order: Which way the products are taken; see `orders.choose_order`. The result is the same to rounding.

    Returns:
        The output, and `h` of each part for others that share its `V` and its input; `None` where the update is merged
        and no gradient will need it. With `order.with_norms` one more, without a way back: `W V`, `(out, r)`, or `None`
        where it would have been a product of its own.

    Example:
        >>> import torch
        >>> W, U, C, V = torch.randn(6, 5), torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3)
        >>> part = PartOfLinear(Place(0, 0), V.T, C, U)
        >>> y, _ = adapted_linear(torch.randn(4, 5), W, None, [part], Order())
        >>> y.shape
        torch.Size([4, 6])
    """
    if not torch.is_grad_enabled():  # a step of autograd costs as much as a small product
        X = rows_of(x, W.shape[1])
        hs = [None if order.merge_forward else times_V(X, part) for part in parts]
        Y, WV = output(X, W, bias, parts, hs, order)
        return _shaped(Y, x), [*hs, WV] if order.with_norms else hs
    places = tuple(part.place for part in parts)
    numbers = [tensor for part in parts for tensor in (part.Vt, part.C, part.U, part.h)]
    y, *new = _AdaptedLinear.apply(x, W, bias, places, order, *numbers)
    found = iter(new)
    hs = [next(found) if part.h is None else part.h for part in parts]
    return y, [*hs, next(found)] if order.with_norms else hs


class _AdaptedLinear(Function):
    """Gradients with `p = dY U` and `q = p C`: `dX = dY W + q Vᵀ`, `dC = pᵀ h`, `dU = dYᵀ h Cᵀ`, `dV = Xᵀ q`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        places: tuple[Place, ...],
        order: Order,
        *numbers: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        parts = _parts(places, numbers)
        X = rows_of(x, W.shape[1])
        hs = [times_V(X, part) for part in parts]
        Y, WV = output(X, W, bias, parts, hs, order)
        needs = ctx.needs_input_grad
        # also where `h` was given: a checkpoint computes it again by itself, and has to save the same
        trains_V = any(needs[5 + 4 * n] for n in range(len(parts)))
        trains = any(needs[5:])
        ctx.places, ctx.order, ctx.device_type = places, order, W.device.type
        saved = [t for part, h in zip(parts, hs, strict=True) for t in (part.Vt, part.C, part.U, h)]
        if not trains:  # the input alone may need a gradient
            saved = [tensor for n, tensor in enumerate(saved) if n % 4 != 3]
        ctx.save_for_backward(x if trains_V else None, W, *saved)
        ctx.shape, ctx.given, ctx.trains = x.shape, [part.h is not None for part in parts], trains
        ctx.set_materialize_grads(False)
        new: list[Tensor | None] = [h for part, h in zip(parts, hs, strict=True) if part.h is None]
        if order.with_norms:
            ctx.mark_non_differentiable(*([] if WV is None else [WV]))
            new.append(WV)
        return _shaped(Y, x), *new

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(ctx.device_type):  # types were settled on the way forward
            with torch.autocast(ctx.device_type, enabled=False):
                return _AdaptedLinear._gradients(ctx, dy, *dhs)
        return _AdaptedLinear._gradients(ctx, dy, *dhs)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor | None, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, *saved = ctx.saved_tensors
        each = 4 if ctx.trains else 3
        parts = [PartOfLinear(place, *saved[each * n : each * (n + 1)]) for n, place in enumerate(ctx.places)]
        needs_x, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        dY = None if dy is None else rows_of(dy, W.shape[0])
        X = None if x is None else rows_of(x, W.shape[1])
        from_others = iter(dhs)
        others = [None if given else next(from_others) for given in ctx.given]
        dX, numbers = gradients(dY, others, X, W, parts, ctx.given, ctx.order, [needs_x, *needs])
        dbias = dY.sum(0) if dY is not None and needs_bias else None
        return None if dX is None else dX.view(ctx.shape), None, dbias, None, None, *numbers


def _parts(places: tuple[Place, ...], numbers: Sequence[Tensor | None]) -> list[PartOfLinear]:
    return [PartOfLinear(place, *numbers[4 * n : 4 * n + 4]) for n, place in enumerate(places)]  # type: ignore[arg-type]


def _shaped(Y: Tensor, x: Tensor) -> Tensor:  # (n, out) -> (*n, out)
    # not a view: models write into the output of a linear, which autograd refuses for a view of a function's own
    result: Tensor = torch.ops.aten._unsafe_view(Y, (*x.shape[:-1], Y.shape[1]))
    return result
