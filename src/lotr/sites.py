"""Which sites share what: modules' names and shapes in, a frozen plan out.

Nothing here sees a weight. The plan is computed once; the tuner executes it, `lotr plan` prints it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .cores import CORES, Core, Index
from .errors import ConfigError, PlanError
from .paths import coordinates

Shape = tuple[int, int]

#: The coordinates along which sites can share factors, in the order of a core tensor's axes.
MODES = ("layer", "projection")


@dataclass(frozen=True)
class Target:
    """A module that is to be adapted, as the planner is told of it.

    Args:
        path: Path of the module in its model.
        shape: `(out, in)` features.
        rank: `(k, r)` asked for.
    """

    path: str
    shape: Shape
    rank: Shape


@dataclass(frozen=True)
class Site:
    """One block of one weight that receives an update, and its coordinates."""

    module: str
    layer: str
    projection: str
    shape: Shape
    rank: Shape


@dataclass(frozen=True)
class Group:
    """The sites that share one `U`, one `V` and one core structure.

    Args:
        name: Unique in its plan; without dots, ends with the block's shape.
        modes: Coordinates along which the sites differ.
        sites: The members, in model order.
        core: Structure of the core.
        index: Position of each module along the modes.
    """

    name: str
    modes: tuple[str, ...]
    sites: tuple[Site, ...]
    core: Core
    index: dict[str, Index] = field(hash=False)

    @property
    def shape(self) -> Shape:
        """Block `(o, i)` that every site of the group has."""
        return self.sites[0].shape

    @property
    def rank(self) -> Shape:
        """Ranks `(k, r)` of the factors."""
        return self.sites[0].rank

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections in the group, in model order."""
        return tuple(dict.fromkeys(site.projection for site in self.sites))

    @property
    def n_factors(self) -> int:
        """Numbers in `U` and `V`."""
        (o, i), (k, r) = self.shape, self.rank
        return o * k + i * r

    @property
    def n_cores(self) -> int:
        """Numbers in the cores of all sites."""
        return self.core.n_parameters(len(self.sites))

    @property
    def n_parameters(self) -> int:
        """Trainable numbers of the group."""
        return self.n_factors + self.n_cores


@dataclass(frozen=True)
class Plan:
    """Groups of an adapter, before anything exists.

    Example:
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(12) for p in ("query", "value")]
        >>> plan = make_plan([Target(path, (768, 768), (8, 8)) for path in paths], modes=("layer",))
        >>> [group.name for group in plan.groups], plan.n_parameters
        (['query_768x768', 'value_768x768'], 26112)
    """

    groups: tuple[Group, ...]

    @cached_property
    def group_of(self) -> dict[str, Group]:
        """Path of a module → its group."""
        return {site.module: group for group in self.groups for site in group.sites}

    @property
    def n_sites(self) -> int:
        """Adapted modules."""
        return sum(len(group.sites) for group in self.groups)

    @property
    def n_parameters(self) -> int:
        """Trainable numbers in total, without a head."""
        return sum(group.n_parameters for group in self.groups)

    @property
    def n_cores(self) -> int:
        """Numbers in the cores: what one more task costs when the factors are kept."""
        return sum(group.n_cores for group in self.groups)

    @property
    def lora_per_rank(self) -> int:
        """Numbers that plain LoRA has at rank 1 on the same modules: `Σ (in + out)`."""
        return sum(sum(site.shape) for group in self.groups for site in group.sites)

    @property
    def equal_lora_rank(self) -> float:
        """Rank at which plain LoRA on the same modules has as many numbers; below 1 no LoRA is as small."""
        return self.n_parameters / self.lora_per_rank if self.groups else 0.0


def make_plan(
    targets: Sequence[Target], modes: Iterable[str], core: str = "free", layers_pattern: Iterable[str] = ()
) -> Plan:
    """Cut the targets into groups that share factors.

    Sites are in one group when their blocks have equal shape and all coordinates outside `modes` agree.

    Args:
        targets: The modules to adapt, in model order.
        modes: Coordinates along which sites share: any of `MODES`.
        core: Structure of the cores, a key of `CORES`.
        layers_pattern: Names of the module lists whose number is the layer; default: found from the paths.

    Returns:
        The plan.

    Raises:
        PlanError: Sites that were asked to share cannot, or a rank does not fit its block.
    """
    modes = tuple(mode for mode in MODES if mode in set(modes))
    members: dict[tuple[object, ...], list[Site]] = defaultdict(list)
    places = coordinates([target.path for target in targets], tuple(layers_pattern))
    for target in targets:
        site = Site(target.path, *places[target.path], target.shape, target.rank)
        fixed = tuple(getattr(site, mode) for mode in MODES if mode not in modes)
        members[(*fixed, site.shape)].append(site)

    names: set[str] = set()
    groups = [_group(sites, modes, core, names) for sites in members.values()]
    if "projection" in modes:
        _check_projections_share(groups)
    return Plan(tuple(groups))


def _group(sites: list[Site], modes: tuple[str, ...], core: str, names: set[str]) -> Group:
    first = sites[0]
    fixed = [getattr(first, mode) for mode in MODES if mode not in modes]
    stem = "-".join(fixed or ["joint"]).replace(".", "-").replace("lotr_", "lotr-")
    o, i = first.shape
    name, n = f"{stem}_{o}x{i}", 1
    while name in names:
        n += 1
        name = f"{stem}~{n}_{o}x{i}"
    names.add(name)
    _check_rank(name, sites)

    axes = [list(dict.fromkeys(getattr(site, mode) for site in sites)) for mode in modes]
    index = {
        site.module: tuple(axis.index(getattr(site, mode)) for axis, mode in zip(axes, modes, strict=True))
        for site in sites
    }
    k, r = first.rank
    structure = CORES[core](k=k, r=r, sizes=tuple(len(axis) for axis in axes))
    return Group(name, modes, tuple(sites), structure, index)


def _check_rank(name: str, sites: list[Site]) -> None:
    ranks = {site.rank: site.module for site in sites}
    if len(ranks) > 1:
        (a, one), (b, other) = list(ranks.items())[:2]
        raise PlanError(
            f'Sites of group "{name}" cannot share factors: "{one}" asks for rank {a} and "{other}" for rank '
            f"{b}. Shared factors need one rank. Give every site of the group the same rank in rank_pattern, "
            "or drop a mode so that they fall into separate groups."
        )
    (o, i), (k, r) = sites[0].shape, sites[0].rank
    if k > o or r > i:
        raise PlanError(
            f'Rank (k, r) = ({k}, {r}) does not fit group "{name}": its blocks are ({o}, {i}), so k can be '
            f"at most {o} and r at most {i}. Use r=({min(k, o)}, {min(r, i)}), a smaller rank for "
            f'"{sites[0].projection}" in rank_pattern, or leave it out with exclude_modules.'
        )


def _check_projections_share(groups: list[Group]) -> None:
    projections = {p: group.shape for group in groups for p in group.projections}
    if len(projections) < 2 or any(len(group.projections) > 1 for group in groups):
        return
    shapes = " and ".join(str(shape) for shape in dict.fromkeys(projections.values()))
    raise PlanError(
        f'Sites of projections "{"|".join(projections)}" cannot share factors: their blocks are {shapes}. '
        'Shared factors need equal blocks. Drop "projection" from modes (method="lotr"), or adapt '
        "projections of equal shape."
    )


def check_modes(modes: Iterable[str]) -> tuple[str, ...]:
    """Return `modes` in canonical order.

    Raises:
        ConfigError: An entry is not a coordinate.

    Example:
        >>> check_modes(["projection", "layer"])
        ('layer', 'projection')
    """
    asked = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in asked if mode not in MODES]
    if unknown:
        raise ConfigError(
            f"modes={asked!r} names {unknown[0]!r}, which is not a coordinate. Known: {', '.join(MODES)}."
        )
    return tuple(mode for mode in MODES if mode in asked)
