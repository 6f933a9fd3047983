"""A group, the sites that share factors, and a part, the sites of one module in one group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..math.cores import Core, Index, Region
from ..math.update import FactoredUpdate, one_by_one, side_by_side
from .blocks import Shape, Site


@dataclass(frozen=True)
class Group:
    """The sites that share one `U`, one `V` and one core structure.

    Factors are as large as the largest block. A site of `n < N` rows uses the first `n` rows of `U`, multiplied by
    `√(N/n)`, so that its part of orthonormal columns has norm one on average; columns and `V` alike.

    Args:
        name: Unique in its plan; without dots, ends with the block's shape.
        modes: Coordinates along which the sites differ.
        sites: The members, in model order.
        core: Structure of the core.
        index: Position of each site along the modes.
        asked_rank: `(k, r)` as the configuration has it, before it was cut to the block.
    """

    name: str
    modes: tuple[str, ...]
    sites: tuple[Site, ...]
    core: Core
    index: dict[Site, Index] = field(hash=False)
    asked_rank: Shape

    @cached_property
    def shape(self) -> Shape:
        """The largest block `(o, i)` of the sites, which most often all have."""
        return block_of(self.sites)

    @property
    def rank(self) -> Shape:
        """Ranks `(k, r)` of the factors, at most as large as the block."""
        return self.core.k, self.core.r

    @cached_property
    def biases(self) -> dict[str, tuple[int]]:
        """Name and shape of what is added to biases: a vector for each projection, as long as its tallest block."""
        by_height = sorted(self.sites, key=lambda site: site.shape[0])
        return {site.bias_name: (site.shape[0],) for site in by_height if site.bias}

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections in the group, in model order."""
        return tuple(dict.fromkeys(site.projection for site in self.sites))

    @property
    def n_factors(self) -> int:
        """Numbers in `U` and `V`, and in what a core keeps with them."""
        (o, i), (k, r) = self.shape, self.rank
        return o * k + i * r + sum(math.prod(self.core.shapes[name]) for name in self.core.of_basis)

    @property
    def n_cores(self) -> int:
        """Numbers in the cores of all sites, and of biases, which train with them."""
        with_factors = sum(math.prod(self.core.shapes[name]) for name in self.core.of_basis)
        own = self.core.n_parameters(len(self.sites)) - with_factors
        return own + sum(size for (size,) in self.biases.values())

    @property
    def n_parameters(self) -> int:
        """Numbers of the group, factors and cores."""
        return self.n_factors + self.n_cores


@dataclass(frozen=True)
class Part:
    """The sites of one module in one group, as a grid.

    Args:
        group: The group.
        name: `weight` when it is the only part of its module; else unique in the module.
        sites: The blocks, from the first row on.
        grid: `(a, b)`: blocks down and across.
        region: Positions along each mode of the group, in the order of the blocks.
    """

    group: Group
    name: str
    sites: tuple[Site, ...]
    grid: tuple[int, int]
    region: Region

    @property
    def block(self) -> Shape:
        """Block `(n, m)` of each of the sites."""
        return self.sites[0].shape

    @property
    def transposed(self) -> bool:
        """Whether the updates are `V C_sᵀ Uᵀ`."""
        return self.sites[0].transposed

    @property
    def gain(self) -> float:
        """`√(N/n · M/m)` for blocks `(n, m)` on factors of `N` and `M` rows; one where they are as large."""
        (rows, columns), (n, m) = self.group.shape, self.block
        return math.sqrt(rows / n * columns / m)

    @property
    def core_shape(self) -> Shape:
        """Shape of the cores side by side."""
        (k, r), (a, b) = self.group.rank, self.grid
        return (a * r, b * k) if self.transposed else (a * k, b * r)

    def lay(self, cores: Tensor) -> Tensor:  # (*extents, k, r) -> `core_shape`
        """Lay the cores of the sites side by side, as they are applied."""
        return side_by_side(cores.mT if self.transposed else cores, self.grid)

    def cores(self, C: Tensor) -> Tensor:  # `core_shape` -> (a·b, k, r)
        """Return the cores of the sites, which lie side by side, one by one."""
        cores = one_by_one(C, self.grid)
        return cores.mT if self.transposed else cores

    def as_seen(
        self, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:  # (n, in), (n, out) -> (n, b, i), (n, a, o)
        """Return inputs and gradients of outputs of the module as the factors meet them, block by block.

        Narrower blocks are padded to the factors, with their gain; of transposed sites the two change places.
        """
        (row, rows), (column, columns), (a, b) = self.rows, self.columns, self.grid
        x = x.narrow(-1, column, columns).unflatten(-1, (b, -1))
        y = self.gain * y.narrow(-1, row, rows).unflatten(-1, (a, -1))
        x, y = (y, x) if self.transposed else (x, y)
        o, i = self.group.shape
        return F.pad(x, (0, i - x.shape[-1])), F.pad(y, (0, o - y.shape[-1]))

    def factored(
        self,
        U: Tensor,  # (o, k)
        C: Tensor,  # `core_shape`
        V: Tensor,  # (i, r)
        scaling: float,
    ) -> FactoredUpdate:
        """Return the update of the part, from the numbers of its group and its cores."""
        left, right = (V, U) if self.transposed else (U, V)
        (n, m), sigma = self.block, scaling * self.gain
        return FactoredUpdate(left[:n], C, right[:m], sigma, self.grid, self.rows[0], self.columns[0])

    @property
    def rows(self) -> tuple[int, int]:
        """First output feature, and their number."""
        return self.sites[0].row, self.grid[0] * self.sites[0].shape[0]

    @property
    def columns(self) -> tuple[int, int]:
        """First input feature, and their number."""
        return self.sites[0].column, self.grid[1] * self.sites[0].shape[1]


def bias_of(
    parts: Iterable[tuple[Part, Mapping[str, Tensor]]], scaling: float
) -> Tensor | None:  # (*rows, out)
    """Return what is added to the bias of a module, from its parts and the numbers of their groups, by name."""
    pieces = [
        numbers[site.bias_name][..., : site.shape[0]]
        for part, numbers in sorted(parts, key=lambda own: own[0].rows)
        for site in part.sites
        if site.bias
    ]
    return scaling * torch.cat(pieces, -1) if pieces else None


def block_of(sites: Sequence[Site]) -> Shape:
    """Return the rows of the tallest and the columns of the widest block of some sites."""
    return max(site.shape[0] for site in sites), max(site.shape[1] for site in sites)


def parts_of(members: Sequence[tuple[Group, list[Site]]]) -> tuple[Part, ...]:
    """Put the sites of one module together: one part a group, or one a projection where they make no grid."""
    parts: list[Part] = []
    for group, sites in members:
        whole = _grid(group, sites)
        pieces = itertools.groupby(sites, key=lambda site: site.projection) if whole is None else ()
        split = [_grid(group, list(piece)) for _, piece in pieces]
        parts += [part for part in (whole, *split) if part is not None]
    return (replace(parts[0], name="weight"),) if len(parts) == 1 else tuple(parts)


def _grid(group: Group, sites: list[Site]) -> Part | None:
    """Return the sites as a part, when both their corners and their positions along the modes are grids."""
    sites = sorted(sites, key=lambda site: (site.row, site.column))
    rows, columns = sorted({s.row for s in sites}), sorted({s.column for s in sites})
    first = sites[0]
    o, i = first.shape
    corners = [(rows[0] + n * o, columns[0] + m * i) for n in range(len(rows)) for m in range(len(columns))]
    runs = [sorted(set(positions)) for positions in zip(*(group.index[s] for s in sites), strict=True)]
    region = tuple(range(run[0], run[-1] + 1) for run in runs)
    if (
        any((s.shape, s.transposed) != (first.shape, first.transposed) for s in sites)
        or [(s.row, s.column) for s in sites] != corners
        or [group.index[s] for s in sites] != list(itertools.product(*region))
    ):
        return None
    outside = [name for name in ("head", "expert") if not {name, "site"} & set(group.modes)]
    alone = [f"{name}{getattr(first, name)}" for name in outside if getattr(first, name) is not None]
    name = "-".join(part for part in (first.piece, *alone) if part)
    slices = tuple(slice(run.start, run.stop) for run in region)
    return Part(group, name, tuple(sites), (len(rows), len(columns)), slices)
