"""A task's numbers as bytes: floats of three widths, or eight bits with one scale a core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, near
from .layout import Layout

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (*_FLOATS, "int8")


def check_dtype(dtype: str) -> str:
    """Return the name of a type that a bank can keep.

    Raises:
        ConfigError: It is none.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not a type of a bank's numbers. {near(dtype, DTYPES)}")
    return dtype


def head_dtype(dtype: str) -> torch.dtype:
    """Return the type in which heads are kept: that of the numbers, and bfloat16 beside int8."""
    return _FLOATS.get(dtype, torch.bfloat16)


def n_bytes(layout: Layout, dtype: str) -> int:
    """Return how many bytes the numbers of a task take."""
    if dtype == "int8":
        return 4 * layout.n_cores + layout.size
    return layout.size * _FLOATS[dtype].itemsize


def encode(
    numbers: Tensor,  # (size,)
    layout: Layout,
    dtype: str,
) -> bytes:
    """Return the numbers as bytes, little end first.

    int8 keeps `q = round(x / s)` in -127 … 127 with `s = max |x| / 127` over the core, in float32, in front.

    Raises:
        ConfigError: A number is not finite, or too large for float16.
    """
    numbers = numbers.detach().float().cpu()
    odd = int((~torch.isfinite(numbers)).sum())
    if odd:
        raise ConfigError(f"{odd} of its {len(numbers)} numbers are not finite. Train it with a lower rate.")
    if dtype == "int8":
        peaks = numbers.new_zeros(layout.n_cores).scatter_reduce(0, layout.core_of, numbers.abs(), "amax")
        # the smallest normal number instead of zero: a core of zeros stays zero
        scales = (peaks / 127).clamp_min(torch.finfo(torch.float32).tiny)
        q = (numbers / scales[layout.core_of]).round().clamp(-127, 127).to(torch.int8)
        return _bytes(scales) + _bytes(q)
    kept = numbers.to(_FLOATS[dtype])
    if torch.isinf(kept).any():
        raise ConfigError(
            f"{float(numbers.abs().max()):.3g} is too large for {dtype}, whose largest number is "
            f"{torch.finfo(kept.dtype).max:.3g}. Make the bank with dtype='bfloat16'."
        )
    return _bytes(kept)


def decode(
    blobs: Sequence[bytes],
    layout: Layout,
    dtype: str,
) -> Tensor:  # (n, size)
    """Return the numbers of several tasks in float32.

    Args:
        blobs: What `encode` made, each of `n_bytes(layout, dtype)`.
        layout: The order of the numbers.
        dtype: The type they are kept in.
    """
    if not blobs:
        return torch.empty(0, layout.size)
    together = torch.frombuffer(bytearray().join(blobs), dtype=torch.uint8).reshape(len(blobs), -1)
    if dtype != "int8":
        return together.view(_FLOATS[dtype]).float()
    scales, q = together.split([4 * layout.n_cores, layout.size], 1)
    return q.view(torch.int8).float() * scales.contiguous().view(torch.float32)[:, layout.core_of]


def rounding_error(
    numbers: Tensor,  # (size,)
    kept: Tensor,  # (size,)
) -> float:
    """Return what keeping cost: `‖kept − x‖ / ‖x‖`, zero for a task of zeros."""
    size = float(torch.linalg.norm(numbers.double()))
    return float(torch.linalg.norm(kept.double() - numbers.double())) / size if size else 0.0


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
