"""How the shared factors start.

With the cores at zero any `U` and `V` leave the base model as it is, bit for bit. Every start draws from a
random generator of its own, so that building an adapter never moves the global random state, and the same
seed gives the same factors whatever was built before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

#: `(n, rank, generator)` → a factor of shape `(n, rank)` in float32: one column a rank, for a block `n` features wide.
FactorInit = Callable[[int, int, Generator], Tensor]
WeightInit = Callable[[Sequence[Tensor], int, int, Generator], tuple[Tensor, Tensor]]


def orthonormal(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Random orthonormal columns, uniformly distributed: `UᵀU = I`.

    Then `‖ΔW‖_F = σ ‖C‖_F` whatever the width and the rank (at most `n`), so one learning rate serves them all.

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

    Example:
        >>> gaussian(8, 3, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3])
    """
    return torch.randn(n, rank, generator=generator)


def kaiming(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Uniform numbers in `±1/√n`, as LoRA starts its `A` (arXiv 2106.09685, and PEFT).

    Example:
        >>> bool(kaiming(16, 3, torch.Generator().manual_seed(0)).abs().max() <= 0.25)
        True
    """
    return (2 * torch.rand(n, rank, generator=generator) - 1) / n**0.5


def weight(
    weights: Sequence[Tensor],  # each (o, i)
    k: int,
    r: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
    """Leading singular directions of the pre-trained weights that share the factors.

    `U` spans the leading left directions of the blocks side by side, `V` the leading right directions of the blocks
    below each other; of one weight alone these are its singular vectors.
    LoRA-XS (arXiv 2405.17604) has those, with the singular values multiplied into one side; here the columns stay
    orthonormal, so that one learning rate serves all. Found by
    subspace iteration, so that no more than `k` or `r` (and some) columns are ever built.

    Args:
        weights: Blocks of the sites of one group.
        k: Columns of `U`.
        r: Columns of `V`.
        generator: CPU generator of the random start of the iteration.

    Returns:
        Orthonormal `U` and `V`, float32.

    Example:
        >>> U, V = weight([torch.randn(6, 5)], 2, 3, torch.Generator().manual_seed(0))
        >>> U.shape, V.shape
        (torch.Size([6, 2]), torch.Size([5, 3]))
    """
    return _leading(weights, k, generator), _leading([W.T for W in weights], r, generator)


def _leading(
    matrices: Sequence[Tensor], rank: int, generator: Generator, rounds: int = 12
) -> Tensor:  # (n, rank)
    n, home = matrices[0].shape[0], matrices[0].device
    basis = orthonormal(n, min(n, 2 * rank + 8), generator).to(home)

    def energy_times(columns: Tensor) -> Tensor:  # Σ M Mᵀ · columns, one wide copy at a time
        total = torch.zeros_like(columns)
        for matrix in matrices:
            M = matrix.detach().to(home, torch.float32)
            total += M @ (M.T @ columns)
        return total

    for _ in range(rounds):
        basis = torch.linalg.qr(energy_times(basis)).Q
    inside = torch.linalg.eigh(basis.T @ energy_times(basis)).eigenvectors.flip(1)[:, :rank]
    return (basis @ inside).cpu()


#: Starts that need a shape alone.
INITS: dict[str, FactorInit] = {"orthonormal": orthonormal, "gaussian": gaussian, "kaiming": kaiming}
#: Starts that look at the weights of the group's sites.
WEIGHT_INITS: dict[str, WeightInit] = {"weight": weight}
#: Starts that a call after construction gives, `lotr.init_from_data` and `lotr.init_from_lora`; until then the factors
#: are orthonormal.
DATA_INITS = ("gradient", "lora")


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
