"""In which order the products of an adapted linear are taken, and what that costs.

Plain: the update passes through the rank, `y += h Lᵀ` with `L = U C` of shape `(out, r)`, or `y += (h Cᵀ) Uᵀ` where
tokens are fewer than outputs, and `dX += q Vᵀ` on the way back. Merged: the base's own product takes `W + L Vᵀ`,
which is built for it and dropped. Both need `h = x V` and `p = dY U` for the gradients of cores and factors, so what
differs is

| | plain | merged |
|---|---|---|
| forward  | `tokens · out` numbers read and written, `r` multiplications each | `out · in`, likewise |
| backward | `tokens · in` | `out · in` |

The rank is in both, so the rule has none: merge where the weight is smaller than the activation by `_MARGIN`. Without
gradients `h` is of no use once the update is merged, and the plain order pays for it: `tokens · in` more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Building reads one array and writes another, the plain order reads and writes the same one.
_MARGIN = 1.5


@dataclass(frozen=True)
class Order:
    """Where the update is merged into the base weight for one product.

    Args:
        merge_forward: On the way forward.
        merge_backward: For the gradient of the input.
        with_norms: Norms of the adapted weight will be asked for, and `W V` for them may come with the base's product.
    """

    merge_forward: bool = False
    merge_backward: bool = False
    with_norms: bool = False

    def __str__(self) -> str:
        forward, backward = ("merged" if m else "plain" for m in (self.merge_forward, self.merge_backward))
        return forward if forward == backward else f"{forward} forward, {backward} backward"


def extra_work(
    tokens: int, shape: tuple[int, int], rank: tuple[int, int], order: Order, factors: bool = True
) -> float:
    """Return the multiplications of a training step that the update adds, as a share of the base layer's.

    Args:
        tokens: Rows of the input.
        shape: `(out, in)` of the weight.
        rank: `(k, r)`.
        order: How the products are taken.
        factors: Whether `U` and `V` train beside the cores.

    Example:
        >>> round(extra_work(1024, (768, 768), (16, 16), Order()), 3)
        0.063
    """
    (o, i), (k, r) = shape, rank
    into_out = o * k * r + o * i * r if order.merge_forward else min(tokens, o) * k * r + tokens * o * r
    forward = tokens * i * r + into_out
    backward = tokens * (o * k + 2 * k * r) + (o * i * r if order.merge_backward else tokens * i * r)
    gradients = tokens * (o * k + k * r + i * r) if factors else 0
    return (forward + backward + gradients) / (2 * tokens * o * i)


#: PyTorch's own steps, one a product.
AUTOGRAD = "autograd"
_NAMED = {"plain": Order(), "merged": Order(True, True)}
#: What a user may ask for.
ORDERS = ("auto", *_NAMED, AUTOGRAD)


def choose_order(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    asked: str = "auto",
    gradients: bool = True,
) -> Order:
    """Return the order that costs least.

    Args:
        tokens: Rows of the input.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        dtype: Of the weight. Below float32 the sum of weight and update would round the update away.
        asked: One of `ORDERS`; a name overrules the costs, not the rounding.
        gradients: Whether gradients will be taken.

    Example:
        >>> str(choose_order(4096, 768, 768, torch.float32)), str(choose_order(1024, 3072, 768, torch.float32))
        ('merged', 'plain')
    """
    if torch.finfo(dtype).bits < 32:
        return Order()
    if asked in _NAMED:
        return _NAMED[asked]
    if not gradients:
        return Order(
            merge_forward=tokens * (out_features + in_features) > _MARGIN * out_features * in_features
        )
    return Order(tokens > _MARGIN * in_features, tokens > _MARGIN * out_features)
