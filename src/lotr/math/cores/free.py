"""The free core: every site has its own `C_s`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from .base import Core, Numbers, Region, Shapes


@dataclass(frozen=True)
class FreeCore(Core):
    """One `(k, r)` matrix a site, nothing shared: `C_s = C[s]`, `S·k·r` numbers. LoTR's core.

    A Tucker-2 decomposition with an identity layer mode, and a three-core tensor train with the layer in
    the middle, are this core.

    Example:
        >>> core = FreeCore(k=2, r=3, sizes=(12,))
        >>> core.shapes, core.n_parameters(n_sites=12)
        ({'C': (12, 2, 3)}, 72)
    """

    by_site: ClassVar[bool] = True

    @classmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        """Any ranks and modes do."""

    @property
    def shapes(self) -> Shapes:
        return {"C": (*self.sizes, self.k, self.r)}

    @property
    def zero(self) -> str:
        return "C"

    def init(self, name: str, generator: Generator) -> Tensor:
        return torch.randn(self.shapes[name], generator=generator, dtype=torch.float32) / self.r**0.5

    def block(self, numbers: Numbers, region: Region) -> Tensor:
        return numbers["C"][region]
