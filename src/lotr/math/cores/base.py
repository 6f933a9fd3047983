"""The contract of a core: how `C_s` is built for the site at `index`.

A core is a *structure*: sizes, and pure functions on the numbers it is given. It owns no numbers. The
tuner keeps them where PEFT can save, count and move them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Generator, Tensor

Index = tuple[int, ...]  # position of a site along each mode of its group
Region = tuple[slice, ...]  # a run of positions along each mode
Numbers = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
_SMALL = 4


@dataclass(frozen=True)
class Core(ABC):
    """Structure of the cores of one group: a tensor of shape `(*sizes, k, r)`, slice by slice.

    Args:
        k: Output rank, rows of every `C_s`.
        r: Input rank, columns of every `C_s`.
        sizes: Extent of each mode of the group.
        ranks: Rank of each mode, for structures that have them.
        task: Which mode is the task, if one is: its numbers are a task's own, and the others belong to the factors.
    """

    k: int
    r: int
    sizes: Index
    ranks: Index = ()
    task: int | None = None

    #: The numbers are slices that belong to one site each, so each is kept with its site.
    by_site: ClassVar[bool] = False
    #: Every `C_s` is the identity, and is left out of products.
    is_identity: ClassVar[bool] = False
    #: The structure has one rank a mode, which `core_ranks` sets.
    has_ranks: ClassVar[bool] = False
    #: Every `C_s` is square: `k` and `r` are one rank.
    is_square: ClassVar[bool] = False
    #: Axes of the number at zero along which the update is a sum of components, which dropout may drop.
    component_axes: ClassVar[slice | None] = None

    @classmethod
    @abstractmethod
    def check(cls, k: int, r: int, modes: tuple[str, ...]) -> None:
        """Refuse ranks and modes with which the structure has no meaning.

        Raises:
            ConfigError: The message names the field.
        """

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Name and shape of the numbers of a group."""

    @property
    @abstractmethod
    def zero(self) -> str | None:
        """Name of the one number at zero that makes every `C_s` zero; `None` where no number can."""

    @property
    def of_basis(self) -> tuple[str, ...]:
        """Names of the numbers that are kept with the factors, and that all tasks on them have in common."""
        return ()

    @abstractmethod
    def init(self, name: str, generator: Generator) -> Tensor:
        """Return how a number starts where it does not start at zero."""

    @abstractmethod
    def block(self, numbers: Numbers, region: Region) -> Tensor:  # (*extents, k, r)
        """Return the cores of a region, from the group's numbers."""

    def drop_components(self, numbers: Numbers, rate: float) -> Numbers:
        """Return the numbers without the components that dropout takes; `(*rows, *shape)` loses the same in all rows.

        A rank of at most four stays whole, as in the code of TensLoRA (arXiv 2509.19391).
        """
        name = str(self.zero)
        number, shape = numbers[name], self.shapes[name]
        for axis in range(-len(shape), 0)[self.component_axes or slice(0)]:
            if shape[axis] > _SMALL:
                mask = F.dropout(number.new_ones(shape[axis]), rate)
                number = number * mask.reshape(-1, *[1] * (-1 - axis))
        return {**numbers, name: number}

    def to_tensor(self, numbers: Numbers) -> Tensor:  # (*sizes, k, r)
        """Return the whole core tensor."""
        return self.block(numbers, tuple(slice(0, size) for size in self.sizes))

    def n_parameters(self, n_sites: int) -> int:
        """Return how many numbers the cores of a group with `n_sites` sites have."""
        if self.by_site:
            return n_sites * self.k * self.r
        return sum(math.prod(shape) for shape in self.shapes.values())
