"""The CP core: a diagonal that is a product of one vector a mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ...errors import ConfigError
from .base import Core, Numbers, Region, Shapes


@dataclass(frozen=True)
class CPCore(Core):
    """`C[l, p, …] = diag(a_l ∘ b_p ∘ …)`: one factor `(size, r)` a mode; without modes one diagonal.

    `r · Σ size` numbers. The first factor starts at zero, the others at one.

    Example:
        >>> CPCore(k=4, r=4, sizes=(12, 3)).shapes, CPCore(k=4, r=4, sizes=()).shapes
        ({'factor_0': (12, 4), 'factor_1': (3, 4)}, {'diagonal': (4,)})
    """

    is_square: ClassVar[bool] = True
    component_axes: ClassVar[slice | None] = slice(-1, None)

    @classmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        if k != r:
            raise ConfigError(
                f"core='cp' or 'scaled_cp' needs one rank, and r=({k}, {r}) is a pair. Use one number."
            )

    @property
    def shapes(self) -> Shapes:
        if not self.sizes:
            return {"diagonal": (self.r,)}
        return {f"factor_{n}": (size, self.r) for n, size in enumerate(self.sizes)}

    @property
    def zero(self) -> str:
        return "factor_0" if self.sizes else "diagonal"

    def init(self, name: str, generator: Generator) -> Tensor:
        if name == self.zero:
            return torch.randn(self.shapes[name], generator=generator, dtype=torch.float32)
        return torch.ones(self.shapes[name], dtype=torch.float32)

    def block(self, numbers: Numbers, region: Region) -> Tensor:
        if not self.sizes:
            return torch.diag_embed(numbers["diagonal"])
        diagonal = numbers["factor_0"][region[0]]
        for n, part in enumerate(region[1:], start=1):
            diagonal = diagonal[..., None, :] * numbers[f"factor_{n}"][part]
        return torch.diag_embed(diagonal)
