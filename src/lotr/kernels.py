"""Products of two matrices, by the library that takes them fastest: on CPUs PyTorch ships two, and asks one.

It gives float32 to MKL, whose kernels for AVX-512 run on Intel's processors; on others MKL falls back to AVX2. oneDNN
has kernels for AVX-512 wherever there is AVX-512, and takes half the time there (`benchmarks/bench_products.py`).

The two round differently. The output of a base layer has to be the frozen model's bit for bit, so it is never taken
here; gradients and the thin products of an update are. `torch.backends.mkldnn.flags(enabled=False)` leaves all to MKL.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

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
        if A.is_contiguous():
            return _linear(A, B.T)
        return _linear(B.T, A).T  # the first operand is read row by row, the second one in any way
    if B.shape[1] < _NARROW:
        return (B.T @ A.T).T
    return A @ B


def _linear(X: Tensor, W: Tensor) -> Tensor:  # (n, m), (r, m) -> (n, r)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(X, W, None, "none", [], "")
    return result


def _onednn_takes(A: Tensor, B: Tensor) -> bool:
    """Whether oneDNN is there, is faster, and nobody has to see or differentiate the operation."""
    return (
        onednn_is_faster()
        and A.dtype == B.dtype == torch.float32
        and A.numel() * B.shape[1] >= _WORTH
        and torch.backends.mkldnn.enabled
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL makes no use of."""
    return (
        "AVX512" in torch.backends.cpu.get_cpu_capability()
        and _vendor() != "GenuineIntel"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _vendor() -> str:
    """Return the vendor that a processor names, or something else where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "unknown")
    return "GenuineIntel" if "GenuineIntel" in platform.processor() else platform.processor()
