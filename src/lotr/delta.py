"""The formula of the library: `ΔW_s = σ · U · C_s · Vᵀ`.

| symbol | shape | meaning |
|---|---|---|
| `W`   | `(out, in)` | a frozen pre-trained weight |
| `U`   | `(o, k)` | output factor, shared by the sites of a group |
| `V`   | `(i, r)` | input factor, shared by the sites of a group |
| `C_s` | `(k, r)` | core of site `s` |
| `σ`   | scalar | scaling, multiplies the update |
| `n`   | | tokens, any number of leading axes |

Forward, merge and export all call this file; nothing else in the library multiplies `U`, `C` and `V`.
Source: LoTR, arXiv 2402.01376.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]


def apply(
    x: Tensor,  # (*n, i)
    input_factor: LinearMap,  # (*n, i) -> (*n, r), multiplies by V
    core: LinearMap,  # (*n, r) -> (*n, k), multiplies by Cᵀ
    output_factor: LinearMap,  # (*n, k) -> (*n, o), multiplies by Uᵀ
    scaling: float | Tensor,
) -> Tensor:  # (*n, o)
    """Apply an update to activations without building `ΔW`: `σ · U (C (Vᵀ x))`.

    The factors are maps rather than tensors, because a shared factor may have to be called as a module
    (sharded or offloaded weights exist only during that call). The scaling acts where rows are shortest.

    Args:
        x: Input of the adapted module, shape `(*n, i)`.
        input_factor: Map `(*n, i) -> (*n, r)`.
        core: Map `(*n, r) -> (*n, k)`.
        output_factor: Map `(*n, k) -> (*n, o)`.
        scaling: `σ`, no unit.

    Returns:
        `x · ΔWᵀ`, shape `(*n, o)`.

    Example:
        >>> import torch
        >>> U, C, V = torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3)
        >>> x = torch.randn(4, 5)
        >>> apply(x, lambda x: x @ V, lambda h: h @ C.T, lambda h: h @ U.T, 1.0).shape
        torch.Size([4, 6])
    """
    return output_factor(core(input_factor(x)) * scaling)


def dense(
    U: Tensor,  # (o, k)
    C: Tensor,  # (k, r)
    V: Tensor,  # (i, r)
    scaling: float | Tensor,
) -> Tensor:  # (o, i)
    """Build `ΔW = σ · U · C · Vᵀ`, for merging and for checks.

    Args:
        U: Output factor, shape `(o, k)`.
        C: Core of the site, shape `(k, r)`.
        V: Input factor, shape `(i, r)`.
        scaling: `σ`.

    Returns:
        The update, shape `(o, i)`.

    Example:
        >>> import torch
        >>> dense(torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3), 1.0).shape
        torch.Size([6, 5])
    """
    return (U @ (C * scaling)) @ V.T


def as_lora(
    U: Tensor,  # (o, k)
    C: Tensor,  # (k, r)
    V: Tensor,  # (i, r)
    scaling: float,
) -> tuple[Tensor, Tensor]:  # (q, i), (o, q)
    """Write an update as the two matrices of plain LoRA, exactly: `ΔW = B · A`, of rank `q = min(k, r)`.

    The core is multiplied into the side that leaves the smaller rank; no decomposition is needed.

    Args:
        U: Output factor, shape `(o, k)`.
        C: Core of the site, shape `(k, r)`.
        V: Input factor, shape `(i, r)`.
        scaling: `σ`, multiplied into the result (so LoRA's own `alpha / r` is one).

    Returns:
        `A` of shape `(q, i)` and `B` of shape `(o, q)`.

    Example:
        >>> import torch
        >>> A, B = as_lora(torch.randn(6, 2), torch.randn(2, 3), torch.randn(5, 3), 1.0)
        >>> A.shape, B.shape
        (torch.Size([2, 5]), torch.Size([6, 2]))
    """
    k, r = C.shape
    C = C * scaling
    return (V.T, U @ C) if r <= k else (C @ V.T, U)
