"""Products of two matrices, by the library that takes them fastest: PyTorch ships two for CPUs, and asks one.

It gives float32 to MKL, whose kernels for AVX-512 run on Intel's processors alone. oneDNN has them for AMD's too, and
takes half the time there. The two round differently: what has to equal the frozen model bit for bit asks PyTorch.

The environment variable `LOTR_ONEDNN=0`, read when the library is imported, leaves every product to PyTorch;
`LOTR_ONEDNN=1` takes oneDNN on any processor. In a running process `USE_ONEDNN` is the same switch.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as nn_module

_MIN_MULTIPLICATIONS = 1 << 20  # below these, calling oneDNN costs more than it saves
_MIN_ROWS = 4  # below these, oneDNN lays a wide weight out anew for longer than the product takes


def product(
    A: Tensor,  # (n, m)
    B: Tensor,  # (m, r)
) -> Tensor:  # (n, r)
    """Return `A B`; any of the two, and the result, may be a transposed view.

    Example:
        >>> product(torch.randn(4, 5), torch.randn(5, 2)).shape
        torch.Size([4, 2])
    """
    if _onednn_is_faster(A, B):
        # oneDNN reads the first operand row by row, and copies it where it does not lie so
        if A.is_contiguous() or (not B.T.is_contiguous() and A.numel() < B.numel()):
            return _onednn(A, B.T)
        return _onednn(B.T, A).T
    # MKL reads a wide matrix that lies column by column twice as fast as the second of two
    return (B.T @ A.T).T if A.device.type == "cpu" and A.stride(0) < A.stride(1) else A @ B


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
    if len(X) >= _MIN_ROWS and _onednn_is_faster(X, W.T):
        return _onednn(X, W, bias)
    return F.linear(X, W, bias)


def runs_op_by_op() -> bool:
    """Whether operations run as they are called, and nothing but autograd watches them.

    Compilers, tracers, transforms of functions, modes that see every operation (selective checkpointing) and forward
    mode need PyTorch's own operations; hooks on all modules need modules that are called.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or nn_module._has_any_global_hook()
    )


def _onednn_is_faster(A: Tensor, B: Tensor) -> bool:
    return (
        USE_ONEDNN
        and A.dtype == B.dtype == torch.float32
        and A.device.type == B.device.type == "cpu"
        and A.numel() * B.shape[1] >= _MIN_MULTIPLICATIONS
        and not torch.is_grad_enabled()  # autograd does not know the operation
        and runs_op_by_op()
    )


def _onednn(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:  # (n, m), (r, m), (r,) -> (n, r)
    if not (W.is_contiguous() or W.T.is_contiguous()):  # pieces of wider matrices are read number by number
        W = W.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(X, W, bias, "none", [], "")
    return result


def _is_amd() -> bool:
    vendor = platform.processor()
    with suppress(OSError):
        vendor += Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in vendor


def _default() -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if choice := os.environ.get("LOTR_ONEDNN"):
        return choice != "0"
    return (
        "AVX512" in torch.backends.cpu.get_cpu_capability()
        and torch.backends.mkl.is_available()
        and _is_amd()
    )


#: Whether oneDNN takes the products of adapted modules.
USE_ONEDNN = _default()
