"""What a module computes for one group: a grid of its blocks, and the region of the core tensor they take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..math.cores import Region

if TYPE_CHECKING:
    from .plan import Group, Site


@dataclass(frozen=True)
class Part:
    """Blocks of one weight that belong to one group, as a grid.

    Args:
        group: The group.
        name: Empty when it is the only part of its module; else unique in the module.
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
    def rows(self) -> tuple[int, int]:
        """First output feature, and their number."""
        return self.sites[0].row, self.grid[0] * self.sites[0].shape[0]

    @property
    def columns(self) -> tuple[int, int]:
        """First input feature, and their number."""
        return self.sites[0].column, self.grid[1] * self.sites[0].shape[1]


def parts_of(members: Sequence[tuple[Group, Site]]) -> tuple[Part, ...]:
    """Put the sites of one module together: one part a group, or one a projection where they make no grid."""
    by_group: dict[str, list[Site]] = {}
    groups = {group.name: group for group, _ in members}
    for group, site in members:
        by_group.setdefault(group.name, []).append(site)
    found = []
    for name, sites in by_group.items():
        group = groups[name]
        whole = _grid(group, sites)
        if whole is not None:
            found.append(whole)
            continue
        for _, piece in itertools.groupby(sites, key=lambda site: site.projection):
            part = _grid(group, list(piece))
            assert part is not None, "the blocks of one projection are a grid"
            found.append(part)
    if len(found) == 1:
        only = found[0]
        return (Part(only.group, "", only.sites, only.grid, only.region),)
    return tuple(found)


def _grid(group: Group, sites: list[Site]) -> Part | None:
    """Return the sites as a part, when both their places and their positions along the modes are grids."""
    sites = sorted(sites, key=lambda site: (site.row, site.column))
    rows, columns = sorted({s.row for s in sites}), sorted({s.column for s in sites})
    o, i = sites[0].shape
    places = [(rows[0] + n * o, columns[0] + m * i) for n in range(len(rows)) for m in range(len(columns))]
    runs = [sorted(set(positions)) for positions in zip(*(group.index[s] for s in sites), strict=True)]
    region = tuple(range(run[0], run[-1] + 1) for run in runs)
    if [(s.row, s.column) for s in sites] != places:
        return None
    if [group.index[s] for s in sites] != list(itertools.product(*region)):
        return None
    first = sites[0]
    alone = first.head is not None and not {"head", "site"} & set(group.modes)
    name = "-".join(p for p in (first.piece, f"head{first.head}" if alone else "") if p)
    slices = tuple(slice(run.start, run.stop) for run in region)
    return Part(group, name, tuple(sites), (len(rows), len(columns)), slices)
