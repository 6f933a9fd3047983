"""The identity core: the factors alone are the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ...errors import ConfigError
from .base import Core, Numbers, Region, Shapes


@dataclass(frozen=True)
class IdentityCore(Core):
    """`C_s = I`, nothing stored: `ΔW_s = σ · U · Vᵀ`. LoRA's core; `U` starts at zero in its place.

    Example:
        >>> IdentityCore(k=2, r=2, sizes=()).to_tensor({})
        tensor([[1., 0.],
                [0., 1.]])
    """

    is_identity: ClassVar[bool] = True
    is_square: ClassVar[bool] = True

    @classmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        if modes:
            raise ConfigError(
                f"core='identity' with modes={modes!r} would give all sites of a group one and the same update. "
                "Use modes=(), or another core."
            )
        if k != r:
            raise ConfigError(f"core='identity' needs one rank, and r=({k}, {r}) is a pair. Use one number.")

    @property
    def shapes(self) -> Shapes:
        return {}

    @property
    def zero(self) -> None:
        return None

    def init(self, name: str, generator: Generator) -> Tensor:
        raise KeyError(name)

    def block(self, numbers: Numbers, region: Region) -> Tensor:
        return torch.eye(self.k).expand(*(part.stop - part.start for part in region), self.k, self.r)
