"""Products of two matrices, by the library that takes them fastest: on CPUs PyTorch ships two, and asks one.

It gives float32 to MKL, whose kernels for AVX-512 run on Intel's processors; on others MKL falls back to AVX2. oneDNN
has kernels for AVX-512 wherever there is AVX-512, and takes half the time there (`benchmarks/bench_products.py`).

The two round differently, and while an update is zero the output has to be the frozen model's bit for bit: then the
caller asks PyTorch for it, as the frozen model does (`base_product`). Everything else is taken here.
`torch.backends.mkldnn.flags(enabled=False)` leaves all to MKL.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# multiplications below which calling oneDNN costs more than it saves
_WORTH = 1 << 20
# rows below which a wide weight costs more to lay out anew than its product does
_FEW = 4
# of activations are summed one number after the other: so many that rounding stays that of a product
_ROWS = 2048


def product(
    A: Tensor,  # (n, m)
    B: Tensor,  # (m, r)
) -> Tensor:  # (n, r)
    """Return `A B`; any of the two, and the result, may be a transposed view.

    Example:
        >>> product(torch.randn(4, 5), torch.randn(5, 2)).shape
        torch.Size([4, 2])
    """
    if A.device.type != "cpu":
        return A @ B
    if takes(A, B):
        # the first operand is read row by row, and copied for that where it does not lie so
        if A.is_contiguous() or (not B.T.is_contiguous() and A.numel() < B.numel()):
            return _linear(A, B.T)
        return _linear(B.T, A).T
    # a wide matrix that lies column by column is read twice as fast as the second of two
    return (B.T @ A.T).T if A.stride(0) < A.stride(1) else A @ B


def linear(
    X: Tensor,  # (n, m)
    W: Tensor,  # (r, m)
    bias: Tensor | None = None,  # (r,)
) -> Tensor:  # (n, r)
    """Return `X Wᵀ + bias`; the weight may be a transposed view.

    Example:
        >>> linear(torch.randn(4, 5), torch.randn(2, 5), torch.randn(2)).shape
        torch.Size([4, 2])
    """
    return _linear(X, W, bias) if takes_rows(X, W) else F.linear(X, W, bias)


def column_sums(
    A: Tensor,  # (n, m)
    B: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor]:  # (m,), (m,)
    """Return the sums over rows of `A` and of `A ⊙ B`.

    On CPUs one pass reads both: that of a layer norm for its weight and bias, with a mean of zero and a spread of one.

    Example:
        >>> A, B = torch.randn(4, 3), torch.randn(4, 3)
        >>> [tuple(total.shape) for total in column_sums(A, B)]
        [(3,), (3,)]
    """
    sums = [_sums_of_both(*rows) for rows in zip(A.split(_ROWS), B.split(_ROWS), strict=True)]
    first, *others = sums
    for plain, weighed in others:
        first = first[0] + plain, first[1] + weighed
    return first


def _sums_of_both(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if not (A.device.type == B.device.type == "cpu" and A.dtype == B.dtype == torch.float32 and _unseen()):
        return A.sum(0), (A * B).sum(0)
    zero, one = A.new_zeros(len(A), 1), A.new_ones(len(A), 1)
    weight = A.new_empty(A.shape[1])  # which decides whether sums are taken, and is not read for them
    _, weighed, plain = torch.ops.aten.native_layer_norm_backward(
        A, B, [A.shape[1]], zero, one, weight, weight, [False, True, True]
    )
    return plain, weighed


def _linear(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:  # (n, m), (r, m), (r,) -> (n, r)
    if not (W.is_contiguous() or W.T.is_contiguous()):  # pieces of wider matrices are read number by number
        W = W.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(X, W, bias, "none", [], "")
    return result


def takes(A: Tensor, B: Tensor) -> bool:  # (n, m), (m, r)
    """Whether the product goes to oneDNN: it is faster, and nobody has to see or differentiate the operation."""
    return (
        ONEDNN_IS_FASTER
        and A.device.type == B.device.type == "cpu"
        and A.dtype == B.dtype == torch.float32
        and A.numel() * B.shape[1] >= _WORTH
        and bool(torch.backends.mkldnn.enabled)
        and _unseen()
    )


def takes_rows(X: Tensor, W: Tensor) -> bool:  # (n, m), (r, m)
    """Whether `X Wᵀ` with a wide weight goes to oneDNN: not for the few rows of a model that writes word by word."""
    return len(X) >= _FEW and takes(X, W.T)


def _unseen() -> bool:
    """Whether nobody sees which operations are called, or differentiates them."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _vendor() -> str:
    """Return the vendor that a processor names, or something else where the system does not tell."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "vendor_id":
                    return value.strip()
    except (OSError, UnicodeDecodeError):
        pass
    return "GenuineIntel" if "GenuineIntel" in platform.processor() else platform.processor()


_exports = getattr(torch.compiler, "is_exporting", None)

#: Whether this processor has AVX-512 of which MKL makes no use.
ONEDNN_IS_FASTER = (
    "AVX512" in torch.backends.cpu.get_cpu_capability()
    and _vendor() != "GenuineIntel"
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def in_graph(x: Tensor, W: Tensor, bias: Tensor | None = None, factor: bool = False) -> Tensor | None:
    """Return `x Wᵀ + bias` as operations of a graph that is being compiled, or nothing where that has no use.

    A graph has one way for every step, and compilers round in ways of their own: there the base's output is taken by
    the faster library at step 0 too, as is the gradient of its input; of a factor everything is. Exported graphs have
    PyTorch's operations alone, because other processes have to read them.

    Args:
        x: Input, `(*n, in)`.
        W: Weight, `(out, in)`.
        bias: Bias, `(out,)`.
        factor: Whether the weight is a factor of an update, not that of a base layer.
    """
    frozen = factor or not any(t is not None and t.requires_grad for t in (W, bias))
    if not (frozen and taken_in_graph(x, W)):
        return None
    if factor:
        h: Tensor = torch.ops.lotr.product(x.reshape(-1, x.shape[-1]), W.T)
        return h.reshape(*x.shape[:-1], W.shape[0])
    y: Tensor = torch.ops.lotr.base(x, W, bias)
    return y


def taken_in_graph(x: Tensor, W: Tensor) -> bool:
    """Whether a graph that is being compiled has products as operations of its own."""
    return (
        ONEDNN_IS_FASTER
        and torch.compiler.is_compiling()
        and not (_exports is None or _exports())  # where PyTorch does not tell, it may be exporting
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and x.device.type == W.device.type == "cpu"
        and x.dtype == W.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _product(A: Tensor, B: Tensor) -> Tensor:
    with torch.no_grad():
        return product(A, B).contiguous()


def _keep_both(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, dC: Tensor) -> tuple[Tensor | None, Tensor | None]:
    A, B = ctx.saved_tensors
    needs_A, needs_B = ctx.needs_input_grad
    take = torch.ops.lotr.product
    return take(dC, B.T) if needs_A else None, take(A.T, dC) if needs_B else None


def _base(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad():
        y = linear(x.reshape(-1, x.shape[-1]), W, bias)
        return y.reshape(*x.shape[:-1], W.shape[0])


def _keep_weight(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _base_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (W,) = ctx.saved_tensors
    dX = torch.ops.lotr.product(dy.reshape(-1, dy.shape[-1]), W)
    return dX.reshape(*dy.shape[:-1], W.shape[1]), None, None


#: `product` and `x Wᵀ + bias` with a frozen weight, as operations of a graph.
OPERATIONS = torch.library.Library("lotr", "DEF")
OPERATIONS.define("product(Tensor A, Tensor B) -> Tensor")
OPERATIONS.impl("product", _product, "CPU")
torch.library.register_fake("lotr::product", lambda A, B: A.new_empty(A.shape[0], B.shape[1]), lib=OPERATIONS)
torch.library.register_autograd("lotr::product", _product_gradients, setup_context=_keep_both, lib=OPERATIONS)
OPERATIONS.define("base(Tensor x, Tensor W, Tensor? bias) -> Tensor")
OPERATIONS.impl("base", _base, "CPU")
torch.library.register_fake(
    "lotr::base", lambda x, W, bias: x.new_empty(*x.shape[:-1], W.shape[0]), lib=OPERATIONS
)
torch.library.register_autograd("lotr::base", _base_gradients, setup_context=_keep_weight, lib=OPERATIONS)
