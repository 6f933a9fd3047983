"""How the shared factors start.

With the cores at zero any `U` and `V` leave the base model as it is, bit for bit. Every start is a
function of the shape and of a random generator of its own, so that building an adapter never moves the
global random state, and the same seed gives the same factors whatever was built before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Start = Callable[[int, int, Generator], Tensor]


def orthonormal(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Random orthonormal columns, uniformly distributed: `UᵀU = I`.

    Then `‖ΔW‖_F = σ ‖C‖_F` whatever the width and the rank, so one learning rate serves them all.

    Args:
        n: Width of the block, features.
        rank: Columns, at most `n`.
        generator: CPU generator that the numbers come from.

    Returns:
        Factor of shape `(n, rank)`, float32.

    Example:
        >>> U = orthonormal(8, 3, torch.Generator().manual_seed(0))
        >>> torch.allclose(U.T @ U, torch.eye(3), atol=1e-6)
        True
    """
    q, triangle = torch.linalg.qr(gaussian(n, rank, generator))
    # QR leaves the signs to the library; fixing them makes the distribution uniform and the result portable
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    columns: Tensor = q * signs
    return columns


def gaussian(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Independent standard normal numbers, as the authors of LoTR start (arXiv 2402.01376).

    The size of the update, and so the learning rate, then depends on the width of the layer.

    Args:
        n: Width of the block, features.
        rank: Columns.
        generator: CPU generator that the numbers come from.

    Returns:
        Factor of shape `(n, rank)`, float32.

    Example:
        >>> gaussian(8, 3, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3])
    """
    return torch.randn(n, rank, generator=generator)


STARTS: dict[str, Start] = {"orthonormal": orthonormal, "gaussian": gaussian}


def generator_for(seed: int, *names: str) -> Generator:
    """Return a CPU generator that depends on the seed and on what it is for, not on call order.

    Args:
        seed: Any integer.
        *names: What the numbers are for, for example adapter, group and factor.

    Returns:
        A fresh `torch.Generator`.

    Example:
        >>> a, b = generator_for(0, "g", "U"), generator_for(0, "g", "V")
        >>> bool(torch.equal(torch.randn(2, generator=a), torch.randn(2, generator=b)))
        False
    """
    digest = hashlib.blake2b("\0".join((str(seed), *names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
