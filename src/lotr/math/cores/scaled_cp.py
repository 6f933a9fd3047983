"""The CP core with trained weights of its terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from .base import Core, Numbers, Region, Shapes
from .cp import CPCore


@dataclass(frozen=True)
class ScaledCPCore(Core):
    """`C[l, p, …] = diag(λ ∘ a_l ∘ b_p ∘ …)`: the CP core, and one weight `λ` for each of its `r` terms.

    `r · (1 + Σ size)` numbers. The weights start at one, the factor of the first mode as Xavier, others orthonormal.

    Source: CaRA, https://openreview.net/forum?id=vexHifrbJg.

    Example:
        >>> ScaledCPCore(k=4, r=4, sizes=(12, 3)).shapes
        {'weights': (4,), 'factor_0': (12, 4), 'factor_1': (3, 4)}
    """

    is_square: ClassVar[bool] = True
    component_axes: ClassVar[slice | None] = slice(-1, None)

    @classmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        CPCore.check(k, r, modes)

    @property
    def _cp(self) -> CPCore:
        return CPCore(self.k, self.r, self.sizes)

    @property
    def shapes(self) -> Shapes:
        return {"weights": (self.r,), **(self._cp.shapes if self.sizes else {})}

    @property
    def zero(self) -> str:
        return "weights"

    def init(self, name: str, generator: Generator) -> Tensor:
        if name == self.zero:
            return torch.ones(self.r, dtype=torch.float32)
        start = nn.init.xavier_normal_ if name == "factor_0" else nn.init.orthogonal_
        return start(torch.empty(self.shapes[name], dtype=torch.float32), generator=generator)

    def block(self, numbers: Numbers, region: Region) -> Tensor:
        diagonal = torch.diag_embed(numbers["weights"])
        return diagonal if not self.sizes else self._cp.block(numbers, region) @ diagonal
