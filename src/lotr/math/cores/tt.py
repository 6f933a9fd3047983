"""The tensor-train core: a product of one matrix a mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...errors import ConfigError
from .base import Core, Numbers, Region, Shapes


@dataclass(frozen=True)
class TTCore(Core):
    """`C[l, p, …] = G_layer[l] · G_projection[p] · …`: one matrix for each position of each mode.

    The first is `(k, r)`, the others `(r, r)`: `size_0·k·r + Σ size·r²` numbers. The first starts at zero, the
    others at the identity. Over one mode this is the free core. With a mode for the task (MetaTT-(4+1)D) the matrices
    of the other modes belong to the factors, and a task on them has its own alone.

    Example:
        >>> TTCore(k=4, r=4, sizes=(12, 3)).shapes
        {'core_0': (12, 4, 4), 'core_1': (3, 4, 4)}
    """

    @classmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        if not modes:
            raise ConfigError(
                "core='tt' with modes=() has no mode to make a train of. Name a mode, or use core='free'."
            )

    @property
    def shapes(self) -> Shapes:
        rows = (self.k, *(self.r for _ in self.sizes[1:]))
        return {f"core_{n}": (size, rows[n], self.r) for n, size in enumerate(self.sizes)}

    @property
    def zero(self) -> str:
        return f"core_{self.task or 0}"

    @property
    def of_basis(self) -> tuple[str, ...]:
        own = f"core_{self.task}"
        return () if self.task is None else tuple(name for name in self.shapes if name != own)

    def init(self, name: str, generator: Generator) -> Tensor:
        if name == self.zero:
            return torch.randn(self.shapes[name], generator=generator, dtype=torch.float32) / self.r**0.5
        return torch.eye(self.r, dtype=torch.float32).expand(self.shapes[name]).clone()

    def block(self, numbers: Numbers, region: Region) -> Tensor:
        tensor = numbers["core_0"][region[0]]
        for n, part in enumerate(region[1:], start=1):
            tensor = tensor[..., None, :, :] @ numbers[f"core_{n}"][part]
        return tensor
