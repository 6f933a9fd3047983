"""Which sites share what: modules' names and shapes in, a frozen plan out.

Nothing here sees a weight. The plan is computed once; the tuner executes it, `lotr plan` prints it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .blocks import Shape, Target, cut
from .cores import CORES, Core, Index
from .errors import ConfigError, PlanError
from .magnitudes import MAGNITUDES
from .parts import Part, parts_of
from .paths import coordinates

#: The coordinates along which sites can share factors, in the order of a core tensor's axes. `site` is all of
#: them in one, or layer and projection in one beside `head`.
MODES = ("site", "layer", "projection", "head")


@dataclass(frozen=True)
class Site:
    """One block of one weight that receives an update, and its coordinates.

    Args:
        module: Path of the module.
        layer: Path of its layer.
        projection: Name of its projection; pieces of one weight are projections of their own.
        head: Number of its attention head, when the weight is cut by heads.
        row: First output feature.
        column: First input feature.
        shape: `(o, i)` features.
        rank: `(k, r)`.
        piece: What tells its projection from others of the same module; may be empty.
    """

    module: str
    layer: str
    projection: str
    head: int | None
    row: int
    column: int
    shape: Shape
    rank: Shape
    piece: str = ""

    def coordinate(self, mode: str, modes: tuple[str, ...]) -> object:
        """Return where the site stands along a mode, given the modes beside it."""
        if mode == "site":
            return (self.module, self.projection) if "head" in modes else self
        return getattr(self, mode)


@dataclass(frozen=True)
class Group:
    """The sites that share one `U`, one `V` and one core structure.

    Args:
        name: Unique in its plan; without dots, ends with the block's shape.
        modes: Coordinates along which the sites differ.
        sites: The members, in model order.
        core: Structure of the core.
        index: Position of each site along the modes.
    """

    name: str
    modes: tuple[str, ...]
    sites: tuple[Site, ...]
    core: Core
    index: dict[Site, Index] = field(hash=False)

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
        """Numbers of the group, factors and cores."""
        return self.n_factors + self.n_cores


@dataclass(frozen=True)
class Plan:
    """Groups of an adapter, before anything exists.

    Args:
        groups: Who shares what.
        targets: The modules that are adapted.
        magnitude: Rule on every module, a key of `MAGNITUDES`.
        train: `"all"`, or `"cores"` when the factors stay as they start.

    Example:
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(12) for p in ("query", "value")]
        >>> plan = make_plan([Target(path, (768, 768), (8, 8)) for path in paths], modes=("layer",))
        >>> [group.name for group in plan.groups], plan.n_parameters
        (['query_768x768', 'value_768x768'], 26112)
    """

    groups: tuple[Group, ...]
    targets: tuple[Target, ...] = ()
    magnitude: str = "none"
    train: str = "all"

    @cached_property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """Path of a module → its parts, each of one group."""
        of_module: dict[str, list[tuple[Group, Site]]] = defaultdict(list)
        for group in self.groups:
            for site in group.sites:
                of_module[site.module].append((group, site))
        return {target.path: parts_of(of_module[target.path]) for target in self.targets}

    @property
    def n_sites(self) -> int:
        """Blocks that receive an update."""
        return sum(len(group.sites) for group in self.groups)

    @property
    def n_parameters(self) -> int:
        """Trained numbers in total, without a head."""
        factors = self.n_factors if self.train == "all" else 0
        return factors + self.n_cores + self.n_magnitudes

    @property
    def n_factors(self) -> int:
        """Numbers in the shared factors, trained or not."""
        return sum(group.n_factors for group in self.groups)

    @property
    def n_cores(self) -> int:
        """Numbers in the cores: what one more task costs when the factors are kept."""
        return sum(group.n_cores for group in self.groups)

    @property
    def n_magnitudes(self) -> int:
        """Numbers in the magnitudes."""
        rule = MAGNITUDES[self.magnitude]
        return sum(sum(shape[0] for shape in rule.shapes(*target.shape).values()) for target in self.targets)

    @property
    def lora_per_rank(self) -> int:
        """Numbers that plain LoRA has at rank 1 on the same modules: `Σ (in + out)`."""
        return sum(sum(target.shape) for target in self.targets)

    @property
    def equal_lora_rank(self) -> float:
        """Rank at which plain LoRA on the same modules has as many numbers; below 1 no LoRA is as small."""
        return self.n_parameters / self.lora_per_rank if self.groups else 0.0


def make_plan(
    targets: Sequence[Target],
    modes: Iterable[str],
    core: str = "free",
    blocks: str = "none",
    core_ranks: int | dict[str, int] | None = None,
    magnitude: str = "none",
    train: str = "all",
    layers_pattern: Iterable[str] = (),
) -> Plan:
    """Cut the targets into sites, and the sites into groups that share factors.

    Sites are in one group when their blocks have equal shape and all coordinates outside `modes` agree. A fused
    weight is cut into its projections wherever anything is shared (`modes` is not empty).

    Args:
        targets: The modules to adapt, in model order.
        modes: Coordinates along which sites share: any of `MODES`, in any order.
        core: Structure of the cores, a key of `CORES`.
        blocks: How weights are cut, one of `BLOCKS`.
        core_ranks: Rank of every mode, or of each by name; default: `r`, at most the mode's extent.
        magnitude: Rule on every module, a key of `MAGNITUDES`.
        train: `"all"` or `"cores"`.
        layers_pattern: Names of the module lists whose number is the layer; default: found from the paths.

    Returns:
        The plan.

    Raises:
        PlanError: Sites that were asked to share cannot, or a rank does not fit its block.
    """
    modes = check_modes(modes)
    members: dict[tuple[object, ...], list[Site]] = defaultdict(list)
    places = coordinates([target.path for target in targets], tuple(layers_pattern))
    for target in targets:
        layer, projection = places[target.path]
        for block in cut(target, blocks, split_fused=bool(modes)):
            name = f"{projection}.{block.piece}" if block.piece else projection
            site = Site(
                module=target.path,
                layer=layer,
                projection=name,
                head=block.head,
                row=block.row,
                column=block.column,
                shape=block.shape,
                rank=target.rank,
                piece=block.piece,
            )
            members[(*_fixed(site, modes), site.shape)].append(site)

    names: set[str] = set()
    groups = [_group(sites, modes, core, core_ranks, names) for sites in members.values()]
    _check_sharing(groups, modes)
    return Plan(tuple(groups), tuple(targets), magnitude, train)


def _fixed(site: Site, modes: tuple[str, ...]) -> list[str]:
    """Return the coordinates that tell the site's group from others."""
    names = [] if "site" in modes else [name for name in ("layer", "projection") if name not in modes]
    fixed = [str(getattr(site, name)) for name in names]
    alone = site.head is not None and "head" not in modes and "site" not in modes
    return [*fixed, f"head{site.head}"] if alone else fixed


def _group(
    sites: list[Site],
    modes: tuple[str, ...],
    core: str,
    core_ranks: int | dict[str, int] | None,
    names: set[str],
) -> Group:
    first = sites[0]
    stem = "-".join(_fixed(first, modes) or ["joint"]).replace(".", "-").replace("lotr_", "lotr-")
    o, i = first.shape
    name, n = f"{stem}_{o}x{i}", 1
    while name in names:
        n += 1
        name = f"{stem}~{n}_{o}x{i}"
    names.add(name)
    _check_rank(name, sites)

    axes = [{c: n for n, c in enumerate(dict.fromkeys(s.coordinate(m, modes) for s in sites))} for m in modes]
    index = {
        site: tuple(axis[site.coordinate(mode, modes)] for axis, mode in zip(axes, modes, strict=True))
        for site in sites
    }
    k, r = first.rank
    sizes = tuple(len(axis) for axis in axes)
    ranks: Index = ()
    if CORES[core].has_ranks:
        asked = core_ranks if isinstance(core_ranks, dict) else dict.fromkeys(modes, core_ranks)
        ranks = tuple(asked.get(m) or min(r, size) for m, size in zip(modes, sizes, strict=True))
    return Group(name, modes, tuple(sites), CORES[core](k=k, r=r, sizes=sizes, ranks=ranks), index)


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


def _check_sharing(groups: list[Group], modes: tuple[str, ...]) -> None:
    """Refuse a plan in which a mode that was asked for brings nothing together anywhere."""
    if "head" in modes and all(site.head is None for group in groups for site in group.sites):
        raise PlanError(
            'No module has attention heads, so nothing can be shared along "head". Adapt query, key, value or '
            'output projections, or drop "head" from modes.'
        )
    projections = {p: group.shape for group in groups for p in group.projections}
    together = any(len(group.projections) > 1 for group in groups)
    if "projection" in modes and len(projections) > 1 and not together:
        shapes = " and ".join(str(shape) for shape in dict.fromkeys(projections.values()))
        raise PlanError(
            f'Sites of projections "{"|".join(projections)}" cannot share factors: their blocks are {shapes}. '
            'Shared factors need equal blocks. Split by head (blocks="head"), drop "projection" from modes '
            '(method="lotr"), or adapt projections of equal shape.'
        )


def check_modes(modes: Iterable[str]) -> tuple[str, ...]:
    """Return `modes` in canonical order.

    Raises:
        ConfigError: An entry is not a coordinate, or says again what `site` says.

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
    if "site" in asked and {"layer", "projection"} & set(asked):
        raise ConfigError(
            f'modes={asked!r} names "site", which is layer and projection in one, beside one of them. Drop "site", '
            "or the others."
        )
    return tuple(mode for mode in MODES if mode in asked)
