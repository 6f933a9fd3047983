"""How the shared factors start.

With the cores at zero any `U` and `V` leave the base model as it is, bit for bit. Every start draws from a
random generator of its own, so that building an adapter never moves the global random state, and the same
seed gives the same factors whatever was built before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

#: `(n, rank, generator)` → a factor of shape `(n, rank)` in float32: one column a rank, for a block `n` features wide.
FactorInit = Callable[[int, int, Generator], Tensor]
CoreInit = Callable[[tuple[int, ...], Generator], Tensor]
WeightInit = Callable[[Sequence[Tensor], int, int, Generator], tuple[Tensor, Tensor]]


def orthonormal(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Random orthonormal columns, uniformly distributed: `UᵀU = I`.

    Then `‖ΔW‖_F = σ ‖C‖_F` whatever the width and the rank (at most `n`), so a learning rate serves every width.

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
    return torch.randn(n, rank, generator=generator, dtype=torch.float32)


def kaiming(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Uniform numbers in `±1/√n`, as LoRA starts its `A` (arXiv 2106.09685, and PEFT).

    Example:
        >>> bool(kaiming(16, 3, torch.Generator().manual_seed(0)).abs().max() <= 0.25)
        True
    """
    return _between(n, rank, n**-0.5, generator)


def uniform(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Uniform numbers in `±1/√rank`: torch's Kaiming start of a factor that is stored `(n, rank)`, as CP methods do.

    Example:
        >>> bool(uniform(16, 4, torch.Generator().manual_seed(0)).abs().max() <= 0.5)
        True
    """
    return _between(n, rank, rank**-0.5, generator)


def identity(n: int, rank: int, generator: Generator) -> Tensor:  # (n, rank)
    """Ones on the diagonal, as MetaTT starts what is not zero (arXiv 2506.09105).

    Example:
        >>> identity(3, 2, torch.Generator()).tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    return torch.eye(n, rank, dtype=torch.float32)


def _between(n: int, rank: int, bound: float, generator: Generator) -> Tensor:
    return (2 * torch.rand(n, rank, generator=generator, dtype=torch.float32) - 1) * bound


def weight(
    weights: Sequence[Tensor],  # each (o, i)
    k: int,
    r: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
    """Leading singular directions of the pre-trained weights that share the factors.

    `U` spans the leading left directions of the blocks side by side, `V` the leading right directions of the blocks
    below each other; of one weight alone these are its singular vectors. Found by subspace iteration, so that no more
    than `k` or `r` (and some) columns are ever built.

    Args:
        weights: Blocks of the sites of one group.
        k: Columns of `U`.
        r: Columns of `V`.
        generator: CPU generator of the random start of the iteration.

    Returns:
        Orthonormal `U` and `V`, float32, or float64 where the weights have it.

    Example:
        >>> U, V = weight([torch.randn(6, 5)], 2, 3, torch.Generator().manual_seed(0))
        >>> U.shape, V.shape
        (torch.Size([6, 2]), torch.Size([5, 3]))
    """
    return _leading(weights, k, generator)[0], _leading([W.T for W in weights], r, generator)[0]


def weight_values(
    weights: Sequence[Tensor],  # each (o, i)
    k: int,
    r: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:  # (o, k), (i, r)
    """The directions of `weight`, those of `V` multiplied by their singular values: of one weight `U_k` and `V_r Σ_r`.

    Source: LoRA-XS, arXiv 2405.17604, whose code has the values beside the input. Under Adam they make it another
    method than `weight`.

    Example:
        >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> weight_values([W], 2, 2, torch.Generator().manual_seed(0))[1].norm(dim=0)
        tensor([3., 2.])
    """
    (U, _), (V, values) = _leading(weights, k, generator), _leading([W.T for W in weights], r, generator)
    return U, V * values


def _leading(
    matrices: Sequence[Tensor], rank: int, generator: Generator
) -> tuple[Tensor, Tensor]:  # (n, rank), (rank,)
    n, home = matrices[0].shape[0], matrices[0].device
    wide = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    basis = orthonormal(n, min(n, 2 * rank + 8), generator).to(home, wide)

    def energy_times(columns: Tensor) -> Tensor:  # Σ M Mᵀ · columns, one wide copy at a time
        total = torch.zeros_like(columns)
        for matrix in matrices:
            M = matrix.detach().to(home, wide)
            total += M @ (M.T @ columns)
        return total

    for _ in range(12):
        basis = torch.linalg.qr(energy_times(basis)).Q
    energies, inside = torch.linalg.eigh(basis.T @ energy_times(basis))  # rising
    values = energies.flip(0)[:rank].clamp_min(0).sqrt()
    return (basis @ inside.flip(1)[:, :rank]).cpu(), values.cpu()


#: Starts of factors that need a shape alone.
INITS: dict[str, FactorInit] = {
    "orthonormal": orthonormal,
    "gaussian": gaussian,
    "kaiming": kaiming,
    "uniform": uniform,
    "identity": identity,
}
#: Starts of factors that look at the weights of the group's sites.
WEIGHT_INITS: dict[str, WeightInit] = {"weight": weight, "weight_values": weight_values}
#: Starts that a call after construction gives, `lotr.init_from_data` and `lotr.init_from_lora`; until then the factors
#: are orthonormal.
DATA_INITS = ("gradient", "first_step", "lora")
#: Starts whose factors have orthonormal columns.
ORTHONORMAL = ("orthonormal", "weight", *DATA_INITS)


def _filled(fill: Callable[..., Tensor], **given: float) -> CoreInit:
    def init(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return fill(torch.empty(shape, dtype=torch.float32), **given, generator=generator)

    return init


def _within_last_extent(shape: tuple[int, ...], generator: Generator) -> Tensor:
    # as a linear layer of each matrix; torch's own Kaiming start takes more axes for those of a convolution
    bound = shape[-1] ** -0.5
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


#: Starts of the numbers of a core, by shape, instead of the structure's own.
CORE_INITS: dict[str, CoreInit] = {
    "uniform": _within_last_extent,
    "kaiming": _within_last_extent,  # and then by how many blocks lie side by side, which the group knows
    "xavier": _filled(nn.init.xavier_uniform_),
    "tiny": _filled(nn.init.normal_, std=1e-5),
    "identity": lambda shape, _: torch.eye(*shape[-2:], dtype=torch.float32).expand(shape).clone(),
}
#: What starts at zero, so that the update does: the cores, a factor, or nothing.
ZEROS = ("core", "output", "input", "none")


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
