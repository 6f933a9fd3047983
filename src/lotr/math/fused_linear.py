"""The adapted linear as one function of autograd: `y = x Wᵀ + b + Σ_parts x V Cᵀ Uᵀ`, with `σ` in `C`.

For one part of `a` blocks below each other, and `n` tokens; all other parts add up (legend: `update.py`):

| way | formula | shape |
|---|---|---|
| forward  | `h = x V` | `(n, r)` |
|          | `y = x Wᵀ + b + h [(I_a ⊗ U) C]ᵀ` | `(n, out)` |
| backward | `p = dy (I_a ⊗ U)` | `(n, a·k)` |
|          | `q = p C` | `(n, r)` |
|          | `dx = dy W + q Vᵀ` | `(n, in)` |
|          | `dC = pᵀ h` | `(a·k, r)` |
|          | `dU = Σ_a dy_aᵀ (h C_aᵀ)` | `(o, k)` |
|          | `dV = xᵀ q` | `(in, r)` |

Plain autograd adds whole activations in passes of their own; here the update is added into the output of the base's
product, and into its gradient of the input. Or the base's product takes `W + ΔW`, built for it and dropped, where that
array is smaller than the activation (`_merging_pays`). Kept for the way back are `h`, and `x` only where `V` trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .matmul import linear, product
from .update import FactoredUpdate, scaled

#: Merging reads one array and writes another, adding to the activation reads and writes the same one.
_MARGIN = 1.5
_Layout = tuple[tuple[int, int], ...]  # first row and number of blocks of each part


def adapted_linear(
    x: Tensor,  # (*n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    updates: Sequence[FactoredUpdate],
) -> Tensor:  # (*n, out)
    """Return `x Wᵀ + bias` plus the updates; while they are zero, bit for bit what the frozen module gives.

    Args:
        x: Input of the module.
        W: Frozen weight.
        bias: Bias, frozen or not.
        updates: Parts that read the whole input, `b = 1`; all tensors are of one floating type and device.

    Example:
        >>> W, U, C, V = torch.randn(6, 5), torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3)
        >>> adapted_linear(torch.randn(4, 5), W, None, [FactoredUpdate(U, C, V, 1.0)]).shape
        torch.Size([4, 6])
    """
    layout = tuple((update.first_row, update.grid[0]) for update in updates)
    factors = [t for update in updates for t in (update.U, scaled(update.C, update.scaling), update.V)]
    if torch.is_grad_enabled():
        y, *_ = _AdaptedLinear.apply(x, W, bias, layout, *factors)
        return y
    Y = _output(_matrix(x, W.shape[1]), W, bias, _updates(layout, factors), None)
    return _unflattened(Y, x)


class _AdaptedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, layout: _Layout, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        updates = _updates(layout, factors)
        X = _matrix(x, W.shape[1])
        hs = [product(X, update.V) for update in updates]
        needs = ctx.needs_input_grad[4:]
        ctx.save_for_backward(x if any(needs[2::3]) else None, W, *factors, *(hs if any(needs) else []))
        ctx.layout, ctx.shape = layout, x.shape
        ctx.set_materialize_grads(False)
        # `h` is an output too, because gradients that are differentiated again pass through it
        return _unflattened(_output(X, W, bias, updates, hs), x), *hs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, *saved = ctx.saved_tensors
        with torch.autocast(W.device.type, enabled=False):  # types were settled on the way forward
            count = 3 * len(ctx.layout)
            updates, hs = _updates(ctx.layout, saved[:count]), saved[count:] or [None] * len(ctx.layout)
            dY = W.new_zeros(ctx.shape.numel() // W.shape[1], len(W)) if dy is None else _matrix(dy, len(W))
            X = None if x is None else _matrix(x, W.shape[1])
            needs_x, _, needs_bias, _, *needs = ctx.needs_input_grad
            dX = None
            merges = _merging_pays(len(dY) * W.shape[1], W)
            if needs_x:
                dX = product(dY, _merged(W, updates) if merges else W).contiguous()
            gradients: list[Tensor | None] = []
            for n, (update, h, dh) in enumerate(zip(updates, hs, dhs, strict=True)):
                *of_factors, q = _gradients(dY, dh, X, h, update, needs[3 * n : 3 * n + 3])
                gradients += of_factors
                rest = dh if merges else q
                if dX is not None and rest is not None:
                    dX.addmm_(rest, update.V.T)
            dx = None if dX is None else dX.view(ctx.shape)
            return dx, None, dY.sum(0) if needs_bias else None, None, *gradients


def _gradients(
    dY: Tensor,  # (n, out)
    dh: Tensor | None,  # (n, r)
    X: Tensor | None,  # (n, in), where V trains
    h: Tensor | None,  # (n, r), where a factor or the core trains
    update: FactoredUpdate,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return `dU`, `dC`, `dV` as they are needed, and `q`."""
    U, C = update.U, update.C
    needs_U, needs_C, needs_V = needs
    D = _matrix(dY[:, update.rows], len(U))  # (n·a, o)
    p = _matrix(product(D, U), len(C))
    q = p @ C if dh is None else dh.addmm(p, C)
    dC = p.T @ h if needs_C and h is not None else None
    dU = product(D.T, _matrix(h @ C.T, U.shape[1])) if needs_U and h is not None else None
    dV = product(X.T, q) if needs_V and X is not None else None
    return dU, dC, dV, q


def _output(
    X: Tensor,  # (n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    updates: Sequence[FactoredUpdate],
    hs: Sequence[Tensor] | None,  # (n, r) each; None where no gradients will be taken
) -> Tensor:  # (n, out)
    # an update of zero has the rounding of the frozen module
    base = F.linear if all(map(_is_zero, updates)) else linear
    n, (rows, columns) = len(X), W.shape
    if _merging_pays(
        n * rows if hs is not None else n * (rows + columns), W
    ):  # without gradients no `h` is needed
        return base(X, _merged(W, updates), bias)
    Y = base(X, W, bias)
    for update, h in zip(updates, hs or [product(X, update.V) for update in updates], strict=True):
        if update.grid[0] == 1 and n < len(update.U):  # fewer tokens than features: the core goes to them
            Y[:, update.rows].addmm_(h @ update.C.T, update.U.T)
        else:
            Y[:, update.rows].addmm_(h, update.left().T)
    return Y


def _merging_pays(activation: int, W: Tensor) -> bool:
    """Whether building `W + ΔW` costs less than passes over so many numbers of activations.

    Both multiply by `r` for each number, so the rank does not matter. Below float32 the sum would lose the update.
    """
    return torch.finfo(W.dtype).bits >= 32 and activation > _MARGIN * W.numel()


def _merged(W: Tensor, updates: Sequence[FactoredUpdate]) -> Tensor:  # (out, in)
    if len(updates) == 1 and len(W) == updates[0].rows.stop - updates[0].rows.start:
        return torch.addmm(W, updates[0].left(), updates[0].V.T)
    merged = W.clone()
    for update in updates:
        merged[update.rows].addmm_(update.left(), update.V.T)
    return merged


def _is_zero(update: FactoredUpdate) -> bool:
    # nearly always the first row tells, and the others need not be read
    return not all(t[:1].any() or t.any() for t in (update.C, update.U, update.V.T))


def _updates(layout: _Layout, factors: Sequence[Tensor]) -> list[FactoredUpdate]:
    """Return the parts from their tensors, three each; `C` has the scaling in it."""
    triples = zip(layout, factors[::3], factors[1::3], factors[2::3], strict=True)
    return [FactoredUpdate(U, C, V, 1.0, (blocks, 1), row) for (row, blocks), U, C, V in triples]


def _matrix(X: Tensor, width: int) -> Tensor:  # (*n, m) -> (n', width)
    return X if X.dim() == 2 and X.shape[1] == width else X.reshape(-1, width)


def _unflattened(Y: Tensor, x: Tensor) -> Tensor:  # (n, out) -> (*n, out)
    # not a view: models write into the output of a linear, which autograd refuses for a view of a function's own
    result: Tensor = torch.ops.aten._unsafe_view(Y, (*x.shape[:-1], Y.shape[1]))
    return result
