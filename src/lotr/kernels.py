"""Products of two matrices, by the library that takes them fastest: on CPUs PyTorch ships two, and asks one.

It gives float32 to MKL, whose kernels for AVX-512 run on Intel's processors; on others MKL falls back to AVX2. oneDNN
has kernels for AVX-512 wherever there is AVX-512, and takes half the time there (`benchmarks/bench_products.py`).

The two round differently. The output of a base layer has to be the frozen model's bit for bit, so it is never taken
here; gradients and the thin products of an update are. `torch.backends.mkldnn.flags(enabled=False)` leaves all to MKL.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# on CPUs products with fewer columns than this are slow in MKL, with fewer rows they are not
_NARROW = 16
# multiplications below which calling oneDNN costs more than it saves
_WORTH = 1 << 20


def product(
    A: Tensor,  # (n, m)
    B: Tensor,  # (m, r)
) -> Tensor:  # (n, r)
    """Return `A B`; one of the two, or the result, may be a transposed view.

    Example:
        >>> product(torch.randn(4, 5), torch.randn(5, 2)).shape
        torch.Size([4, 2])
    """
    if A.device.type != "cpu":
        return A @ B
    if _onednn_takes(A, B):
        # the first operand is read row by row, and copied for that where it does not lie so; the second one in any way
        if A.is_contiguous() or (not B.T.is_contiguous() and A.numel() < B.numel()):
            return _linear(A, B.T)
        return _linear(B.T, A).T
    if B.shape[1] < _NARROW:
        return (B.T @ A.T).T
    return A @ B


def _linear(X: Tensor, W: Tensor) -> Tensor:  # (n, m), (r, m) -> (n, r)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(X, W, None, "none", [], "")
    return result


def _onednn_takes(A: Tensor, B: Tensor) -> bool:
    """Whether oneDNN is faster, and nobody has to see or differentiate the operation."""
    return (
        ONEDNN_IS_FASTER
        and A.dtype == B.dtype == torch.float32
        and A.numel() * B.shape[1] >= _WORTH
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _vendor() -> str:
    """Return the vendor that a processor names, or something else where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "unknown")
    return "GenuineIntel" if "GenuineIntel" in platform.processor() else platform.processor()


#: Whether this processor has AVX-512 of which MKL makes no use.
ONEDNN_IS_FASTER = (
    "AVX512" in torch.backends.cpu.get_cpu_capability()
    and _vendor() != "GenuineIntel"
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


_OPERATIONS = torch.library.Library("lotr", "DEF")
_OPERATIONS.define("product(Tensor A, Tensor B) -> Tensor")


def _computed(A: Tensor, B: Tensor) -> Tensor:
    with torch.no_grad():
        return product(A, B).contiguous()


def _alike(A: Tensor, B: Tensor) -> Tensor:
    return A.new_empty(A.shape[0], B.shape[1])


_OPERATIONS.impl("product", _computed, "CPU")
torch.library.register_fake("lotr::product", _alike, lib=_OPERATIONS)
_product = torch.ops.lotr.product


def in_graph(x: Tensor, W: Tensor, bias: Tensor | None = None, factor: bool = False) -> Tensor | None:
    """Return `x Wᵀ + bias` as operations of a graph that is being compiled, or nothing where that has no use.

    Of a base layer the output is its own, and the gradient of the input a `product`; of a factor everything is.

    Args:
        x: Input, `(*n, in)`.
        W: Weight, `(out, in)`.
        bias: Bias, `(out,)`.
        factor: Whether the weight is a factor of an update, not that of a base layer.
    """
    if (
        not (ONEDNN_IS_FASTER and torch.compiler.is_compiling() and torch.is_grad_enabled())
        or not (x.device.type == W.device.type == "cpu" and x.dtype == W.dtype == torch.float32)
        or torch.is_autocast_enabled("cpu")
        or (not factor and any(t is not None and t.requires_grad for t in (W, bias)))
    ):
        return None
    result: Tensor = _Factor.apply(x, W) if factor else _Base.apply(x, W, bias)  # type: ignore[no-untyped-call]
    return result


class _Base(Function):
    """`x Wᵀ + bias` with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        dX = _product(dy.reshape(-1, dy.shape[-1]), W)
        return dX.reshape(*dy.shape[:-1], W.shape[1]), None, None


class _Factor(Function):
    """`x Wᵀ` with a weight that may train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        X = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(X, W)
        return _product(X, W.T).reshape(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        X, W = ctx.saved_tensors
        dY = dy.reshape(-1, dy.shape[-1])
        dx = _product(dY, W).reshape(*dy.shape[:-1], W.shape[1]) if ctx.needs_input_grad[0] else None
        return dx, _product(X.T, dY).T if ctx.needs_input_grad[1] else None
