"""The base's own product in an adapted linear: whose rounding it has, and what comes along with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import linear, takes_rows

if TYPE_CHECKING:
    from .linear_products import PartOfLinear


def base_output(
    X: Tensor,  # (n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    parts: Sequence[PartOfLinear],
) -> Tensor:  # (n, out)
    """Return `X Wᵀ + bias`, as the frozen model rounds it while the updates are zero."""
    if takes_rows(X, W) and not _all_zero(parts):
        return linear(X, W, bias)
    return F.linear(X, W, bias)


def gives_times_V(X: Tensor, W: Tensor, parts: Sequence[PartOfLinear]) -> bool:
    """Whether `W V` is cheaper as some more rows of the base's product than as a product of its own.

    A wide product lays the weight out anew before it reads it, whatever the rows; the rows are copied, to lie together.
    """
    part = parts[0]
    return (
        len(parts) == 1
        and part.Vt.shape[1] == W.shape[1]
        and len(part.U) * part.place.grid[0] == len(W)
        and part.Vt.dtype == X.dtype
        and 2 * len(X) <= len(W)
        and takes_rows(X, W)
        and not _all_zero(parts)
    )


def and_times_V(
    X: Tensor,  # (n, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    Vt: Tensor,  # (r, in)
) -> tuple[Tensor, Tensor]:  # (n, out), (out, r)
    """Return `X Wᵀ + bias` and `W V`, by one product."""
    Y, VtWt = linear(torch.cat([X, Vt]), W).split([len(X), len(Vt)])
    return Y if bias is None else Y.add_(bias), VtWt.T


def _all_zero(parts: Sequence[PartOfLinear]) -> bool:
    """Whether all parts change nothing: which of their numbers start at zero is up to the method."""
    return not any(all(map(_any, (part.C, part.U, part.Vt))) for part in parts)


def _any(numbers: Tensor) -> bool:
    # nearly always the first row tells, and the others need not be read
    return bool(numbers[:1].any() or numbers.any())
