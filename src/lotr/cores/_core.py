"""The contract of a core: how `C_s` is built for the site at `index`.

A core is a *structure*: sizes, and pure functions on the numbers it is given. It owns no numbers. The
tuner keeps them where PEFT can save, count and move them: what a group shares in the basis, what belongs
to one site on that site's layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Index = tuple[int, ...]  # position of a site along each mode of its group
Numbers = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Core(ABC):
    """Structure of the cores of one group.

    Args:
        k: Output rank, rows of every `C_s`.
        r: Input rank, columns of every `C_s`.
        sizes: Extent of each mode of the group.
    """

    k: int
    r: int
    sizes: Index

    @property
    @abstractmethod
    def shared_shapes(self) -> Shapes:
        """Name and shape of what is stored once a group."""

    @property
    @abstractmethod
    def own_shapes(self) -> Shapes:
        """Name and shape of what is stored with every site."""

    @abstractmethod
    def matrix(self, index: Index, shared: Numbers, own: Numbers) -> Tensor:  # (k, r)
        """Return `C_s` of the site at `index`, given the group's numbers and the site's own."""

    @abstractmethod
    def to_tensor(self, shared: Numbers, owns: Mapping[Index, Numbers]) -> Tensor:  # (*sizes, k, r)
        """Return the whole core tensor; places without a site are zero."""

    @abstractmethod
    def from_tensor(
        self,
        tensor: Tensor,  # (*sizes, k, r)
    ) -> tuple[dict[str, Tensor], dict[Index, dict[str, Tensor]]]:
        """Return the group's numbers and those of every site that reproduce `tensor`."""

    def n_parameters(self, n_sites: int) -> int:
        """Return how many numbers the cores of a group with `n_sites` sites have."""
        return _count(self.shared_shapes) + n_sites * _count(self.own_shapes)


def _count(shapes: Shapes) -> int:
    total = 0
    for shape in shapes.values():
        n = 1
        for extent in shape:
            n *= extent
        total += n
    return total
