"""The Tucker core: a small core tensor, and one factor a mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ...errors import ConfigError
from .base import Core, Numbers, Region, Shapes


@dataclass(frozen=True)
class TuckerCore(Core):
    """`C[l, p, …] = 𝒢 ×₁ a_l ×₂ b_p …`: a core tensor `𝒢` and one factor `(size, rank)` a mode.

    `∏ ranks · k · r + Σ size · rank` numbers. The core tensor starts at zero; the factors are orthonormal.

    Example:
        >>> core = TuckerCore(k=4, r=4, sizes=(12, 3), ranks=(4, 4))
        >>> core.shapes
        {'core': (4, 4, 4, 4), 'factor_0': (12, 4), 'factor_1': (3, 4)}
    """

    has_ranks: ClassVar[bool] = True
    component_axes: ClassVar[slice | None] = slice(None)

    @classmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        if not modes:
            raise ConfigError(
                "core='tucker' with modes=() has no mode to factorise. Name a mode, or use core='free'."
            )

    @property
    def shapes(self) -> Shapes:
        factors = zip(self.sizes, self.ranks, strict=True)
        return {"core": (*self.ranks, self.k, self.r)} | {
            f"factor_{n}": shape for n, shape in enumerate(factors)
        }

    @property
    def zero(self) -> str:
        return "core"

    def init(self, name: str, generator: Generator) -> Tensor:
        normal = torch.randn(self.shapes[name], generator=generator, dtype=torch.float32)
        if name == "core":
            return normal / self.r**0.5
        # columns where they fit, else rows: more ranks than positions
        tall = normal if normal.shape[0] >= normal.shape[1] else normal.T
        q: Tensor = torch.linalg.qr(tall).Q
        return q if tall is normal else q.T

    def block(self, numbers: Numbers, region: Region) -> Tensor:
        tensor = numbers["core"]
        for n, part in enumerate(region):  # the leading axis is contracted, its positions come last
            tensor = torch.tensordot(tensor, numbers[f"factor_{n}"][part], ([0], [1]))
        return tensor.movedim((0, 1), (-2, -1))
