"""A stack of experts with its update in factored form, which experts' own forward passes multiply by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StackUpdate:
    """Update of the experts of one group, `ΔW_e = left · C_e · right`.

    Args:
        left: Output factor, shape `(out, k)`.
        cores: Scaled cores, shape `(experts, k, r)`; `(k, r)` of a selected expert.
        right: Transposed input factor, shape `(r, in)`.
        transposed: Whether the weight is stored `(experts, in, out)`, and is `ΔW_eᵀ`.
    """

    left: Tensor
    cores: Tensor
    right: Tensor
    transposed: bool = False

    def dense(self) -> Tensor:
        """Build the update as the weight is stored."""
        dW = self.left @ self.cores @ self.right
        return dW.mT if self.transposed else dW


class StackedWeight(Tensor):
    """`W + ΔW` of a stack of experts: products go through the rank, and whatever else is done sees the dense sum.

    An update whose experts share factors costs one product with each factor for all tokens, and a small one an expert.
    """

    updates: Sequence[StackUpdate]

    @classmethod
    def of(cls, W: Tensor, updates: Sequence[StackUpdate]) -> StackedWeight:
        """Put updates on a weight `(experts, out, in)`, `(out, in)`, or its transpose."""
        weight = W.as_subclass(cls)
        weight.updates = tuple(updates)
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation of torch on the weight."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OF_THE_BASE:
                return func(*args, **kwargs)
            through_rank = _OPERATIONS.get(func)
            result = NotImplemented if through_rank is None else through_rank(func, *args, **kwargs)
            return func(*map(_dense, args), **kwargs) if result is NotImplemented else result


def _dense(value: Any) -> Any:
    if not isinstance(value, StackedWeight):
        return value
    W = value.as_subclass(Tensor)
    for update in value.updates:
        W = (W + update.dense().to(W)).to(W.dtype)
    return W


def _select(func: Any, weight: Any, index: Any) -> Any:
    """`weight[expert]`, of one expert."""
    if weight.dim() != 3 or not (isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)):
        return NotImplemented
    chosen = [replace(update, cores=update.cores[index]) for update in weight.updates]
    return StackedWeight.of(weight.as_subclass(Tensor)[index], chosen)


def _transpose(func: Any, weight: Any, *dims: int) -> Any:
    """`weight.transpose(-2, -1)`."""
    if dims not in ((-2, -1), (-1, -2)) or weight.dim() != 3:
        return NotImplemented
    flipped = [replace(update, transposed=not update.transposed) for update in weight.updates]
    return StackedWeight.of(weight.as_subclass(Tensor).transpose(*dims), flipped)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """`x · Wᵀ` for one expert."""
    return _multiply(x, weight, lambda W: F.linear(x, W, bias), stored_transposed=False)


def _matmul(func: Any, x: Any, weight: Any) -> Any:
    """`x · W` for one expert that is stored `(in, out)`."""
    return _multiply(x, weight, lambda W: x @ W, stored_transposed=True)


def _multiply(x: Any, weight: Any, base: Callable[[Tensor], Tensor], stored_transposed: bool) -> Any:
    if not isinstance(weight, StackedWeight) or isinstance(x, StackedWeight) or weight.dim() != 2:
        return NotImplemented
    y = base(weight.as_subclass(Tensor))
    for update in weight.updates:
        if update.transposed != stored_transposed:
            return NotImplemented
        right, core, left = (tensor.to(x.dtype) for tensor in (update.right, update.cores, update.left))
        y = y + F.linear(F.linear(F.linear(x, right), core), left)
    return y


def _grouped(func: Any, x: Any, weight: Any, *, offs: Any, **words: Any) -> Any:
    """Rows `(tokens, in)`, sorted by expert, times a stack that is stored `(experts, in, out)`."""
    if not isinstance(weight, StackedWeight) or not all(update.transposed for update in weight.updates):
        return NotImplemented
    y = func(x, weight.as_subclass(Tensor), offs=offs, **words)
    expert = torch.bucketize(torch.arange(len(x), device=x.device, dtype=offs.dtype), offs, right=True)
    expert = expert.clamp(max=weight.shape[0] - 1)  # rows of no expert follow the others
    for update in weight.updates:
        right, cores, left = (tensor.to(x.dtype) for tensor in (update.right, update.cores, update.left))
        h = F.linear(x, right)
        h = torch.bmm(cores[expert], h.unsqueeze(-1)).squeeze(-1)
        y = y + F.linear(h, left)
    return y


_OF_THE_BASE = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad")
} | {
    Tensor.dim,
    Tensor.size,
    Tensor.as_subclass,
    Tensor.data_ptr,
    Tensor.is_floating_point,
}

_OPERATIONS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _select,
    Tensor.transpose: _transpose,
    F.linear: _linear,
    Tensor.matmul: _matmul,
    torch.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch._grouped_mm: _grouped,  # what F.grouped_mm calls
}
