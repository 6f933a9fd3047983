"""The free core: every site has its own `C_s`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ._core import Core, Index, Numbers, Shapes


@dataclass(frozen=True)
class FreeCore(Core):
    """One `(k, r)` matrix a site, nothing shared: `C_s = C[s]`, `S·k·r` numbers. LoTR's core.

    A Tucker-2 decomposition with an identity layer mode, and a three-core tensor train with the layer in
    the middle, are this core.

    Example:
        >>> core = FreeCore(k=2, r=3, sizes=(12,))
        >>> core.own_shapes, core.n_parameters(n_sites=12)
        ({'C': (2, 3)}, 72)
    """

    @property
    def shared_shapes(self) -> Shapes:
        return {}

    @property
    def own_shapes(self) -> Shapes:
        return {"C": (self.k, self.r)}

    def matrix(self, index: Index, shared: Numbers, own: Numbers) -> Tensor:
        return own["C"]

    def to_tensor(self, shared: Numbers, owns: Mapping[Index, Numbers]) -> Tensor:
        like = next(iter(owns.values()))["C"]
        tensor = torch.zeros(*self.sizes, self.k, self.r, dtype=like.dtype, device=like.device)
        for index, own in owns.items():
            tensor[index] = own["C"]
        return tensor

    def from_tensor(self, tensor: Tensor) -> tuple[dict[str, Tensor], dict[Index, dict[str, Tensor]]]:
        places = itertools.product(*(range(n) for n in self.sizes))
        return {}, {index: {"C": tensor[index]} for index in places}
