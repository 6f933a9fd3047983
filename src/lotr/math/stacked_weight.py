"""A stack of experts with its update in factored form, which experts' own forward passes multiply by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class StackUpdate:
    """Update of the experts of one parameter, `ΔW_e = left_e · C_e · right_e`.

    Args:
        left: Output factor, shape `(out, k)`, or `(experts, out, k)` where each expert has its own.
        cores: Scaled cores, shape `(experts, k, r)`; `(k, r)` of a selected expert.
        right: Transposed input factor, shape `(r, in)`, or `(experts, r, in)`.
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

    def select(self, core: Any, expert: Any) -> StackUpdate:
        """Return the update of one expert, or those of many, by the numbers of their cores and their own."""
        left, right = (own if own.dim() == 2 else own[expert] for own in (self.left, self.right))
        return StackUpdate(left, self.cores[core], right, self.transposed)

    def apply(self, x: Tensor) -> Tensor:  # (n, in) -> (n, out)
        """Return `x · ΔWᵀ` of a selected expert, or of one a token."""
        for matrix in (self.right, self.cores, self.left):
            x = F.linear(x, matrix.to(x.dtype)) if matrix.dim() == 2 else _each(x, matrix)
        return x

    def apply_sorted(self, x: Tensor, core: Tensor, expert: Tensor) -> Tensor:  # (n, in) -> (n, out)
        """Return `x · ΔWᵀ` of tokens that are sorted by expert, from the number of each one's core and expert."""
        h = _each(_by_expert(x, self.right, expert), self.cores[core])
        return _by_expert(h, self.left, expert)


def _each(x: Tensor, matrices: Tensor) -> Tensor:  # (n, q), (n, p, q) -> (n, p)
    return torch.bmm(matrices.to(x.dtype), x.unsqueeze(-1)).squeeze(-1)


def _by_expert(x: Tensor, factor: Tensor, expert: Tensor) -> Tensor:  # (n, q), (*experts, p, q) -> (n, p)
    factor = factor.to(x.dtype)
    if factor.dim() == 2:
        return F.linear(x, factor)
    runs = x.split(expert.bincount(minlength=len(factor)).tolist())
    return torch.cat([F.linear(run, own) for run, own in zip(runs, factor, strict=True)])


class StackedWeight(Tensor):
    """`W + ΔW` of a stack of experts: products go through the rank, and whatever else is done sees the dense sum.

    An update whose experts share factors costs one product with each factor for all tokens, and a small one an expert.

    With `copies`, every expert is there several times in a run, with cores of its own each time: expert `e` is
    `e · copies` up to `(e + 1) · copies - 1`. There is no dense sum of these.
    """

    updates: Sequence[StackUpdate]
    copies: int
    routed: Tensor | None

    @classmethod
    def of(
        cls, W: Tensor, updates: Sequence[StackUpdate], copies: int = 1, routed: Tensor | None = None
    ) -> StackedWeight:
        """Put updates on a weight `(experts, out, in)`, `(out, in)`, or its transpose.

        With `copies`, `routed` are the sorted numbers of the copies that tokens are sent to; higher ones than the last
        are of no expert.
        """
        weight = W.as_subclass(cls)
        weight.updates, weight.copies, weight.routed = tuple(updates), copies, routed
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
            if result is not NotImplemented:
                return result
            return func(*map(_dense, args), **{name: _dense(value) for name, value in kwargs.items()})


def _dense(value: Any) -> Any:
    if not isinstance(value, StackedWeight):
        return value
    if value.copies > 1:
        raise ConfigError(
            "Rows of a batch have tasks of their own, and the experts are multiplied in a way that does not tell which "
            "token is whose, or are compiled. Choose model.set_experts_implementation('grouped_mm') or 'eager', and do "
            "not compile the model."
        )
    W = value.as_subclass(Tensor)
    for update in value.updates:
        W = (W + update.dense().to(W)).to(W.dtype)
    return W


def _select(func: Any, weight: Any, index: Any) -> Any:
    """`weight[expert]` of one expert, or of one a token."""
    numbers = isinstance(index, Tensor) and index.dim() < 2 and index.dtype in (torch.int32, torch.int64)
    if not (isinstance(index, int) or numbers) or (weight.dim() != 3 and weight.copies == 1):
        return NotImplemented
    expert = index // weight.copies
    chosen = [update.select(index, expert) for update in weight.updates]
    return StackedWeight.of(weight.as_subclass(Tensor)[expert], chosen)


def _transpose(func: Any, weight: Any, *dims: int) -> Any:
    """`weight.transpose(-2, -1)`."""
    if dims not in ((-2, -1), (-1, -2)) or weight.dim() != 3:
        return NotImplemented
    flipped = [replace(update, transposed=not update.transposed) for update in weight.updates]
    base = weight.as_subclass(Tensor).transpose(*dims)
    return StackedWeight.of(base, flipped, weight.copies, weight.routed)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """`x · Wᵀ` for one expert."""
    return _multiply(x, weight, lambda W: F.linear(x, W, bias), stored_transposed=False)


def _matmul(func: Any, x: Any, weight: Any) -> Any:
    """`x · W` for one expert that is stored `(in, out)`."""
    return _multiply(x, weight, lambda W: x @ W, stored_transposed=True)


def _batched(func: Any, one: Any, other: Any) -> Any:
    """`W · x`, or `x · W` where it is stored `(in, out)`, for an expert a token."""
    if isinstance(one, StackedWeight):
        x, weight, base, transposed = other, one, lambda W: func(W, other), False
    else:
        x, weight, base, transposed = one, other, lambda W: func(one, W), True
    if x.shape[1 if transposed else 2] != 1:
        return NotImplemented
    return _multiply(x, weight, base, transposed, experts=True)


def _multiply(
    x: Any, weight: Any, base: Callable[[Tensor], Tensor], stored_transposed: bool, experts: bool = False
) -> Any:
    """Return `x · (W + ΔW)ᵀ` of one expert, or of one a token; `base` multiplies by `W`."""
    if not isinstance(weight, StackedWeight) or isinstance(x, StackedWeight) or weight.copies > 1:
        return NotImplemented
    if weight.dim() != 2 + experts or any(u.transposed != stored_transposed for u in weight.updates):
        return NotImplemented
    y = base(weight.as_subclass(Tensor))
    for update in weight.updates:
        y = y + update.apply(x.flatten(1) if experts else x).view(y.shape)
    return y


def _grouped(func: Any, x: Any, weight: Any, *, offs: Any, **words: Any) -> Any:
    """Rows `(tokens, in)`, sorted by expert, times a stack that is stored `(experts, in, out)`."""
    if not isinstance(weight, StackedWeight) or not all(update.transposed for update in weight.updates):
        return NotImplemented
    n = len(weight.as_subclass(Tensor))
    if weight.routed is None:
        core = torch.bucketize(torch.arange(len(x), device=x.device, dtype=offs.dtype), offs, right=True)
    else:  # `offs` was counted in float32, which is not exact for as many copies
        core = weight.routed
        if len(core) != len(x):
            return NotImplemented
        tokens = torch.bincount(core // weight.copies, minlength=n)[:n]
        offs = tokens.cumsum(0).to(offs.dtype)
    y = func(x, weight.as_subclass(Tensor), offs=offs, **words)
    core = core.clamp(max=n * weight.copies - 1)  # tokens of no expert follow the others
    for update in weight.updates:
        y = y + update.apply_sorted(x, core, core // weight.copies)
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
    torch.bmm: _batched,
    torch._grouped_mm: _grouped,  # what F.grouped_mm calls
}
