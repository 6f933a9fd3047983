"""Sites, the groups that share factors, and the plan: who shares what, before anything exists.

The plan is computed once by `grouping.make_plan`; the tuner executes it, `lotr plan` prints it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import ConfigError
from ..math.cores import Core, Index
from ..math.magnitude import MAGNITUDES
from .blocks import Shape, Target
from .parts import Part, parts_of

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
        trainable: `"all"`, or `"cores"` when the factors stay as they start.

    Example:
        >>> from lotr.grouping import make_plan
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(12) for p in ("query", "value")]
        >>> plan = make_plan([Target(path, (768, 768), (8, 8)) for path in paths], modes=("layer",))
        >>> [group.name for group in plan.groups], plan.n_parameters
        (['query_768x768', 'value_768x768'], 26112)
    """

    groups: tuple[Group, ...]
    targets: tuple[Target, ...] = ()
    magnitude: str = "none"
    trainable: str = "all"

    @cached_property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """Path of a module → its parts, each of one group."""
        of_module: dict[str, list[tuple[Group, Site]]] = defaultdict(list)
        for group in self.groups:
            for site in group.sites:
                of_module[site.module].append((group, site))
        return {target.path: parts_of(of_module[target.path]) for target in self.targets}

    @cached_property
    def shape_of(self) -> dict[str, Shape]:
        """Path of a module → its `(out, in)` features."""
        return {target.path: target.shape for target in self.targets}

    @property
    def n_sites(self) -> int:
        """Blocks that receive an update."""
        return sum(len(group.sites) for group in self.groups)

    @property
    def n_parameters(self) -> int:
        """Trained numbers in total, without a head."""
        factors = self.n_factors if self.trainable == "all" else 0
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
    def widest_rank(self) -> int:
        """Largest rank, the same for all groups, that fits every block."""
        return min(min(group.shape) for group in self.groups)

    @property
    def lora_per_rank(self) -> int:
        """Numbers that plain LoRA has at rank 1 on the same modules: `Σ (in + out)`."""
        return sum(sum(target.shape) for target in self.targets)

    @property
    def equal_lora_rank(self) -> float:
        """Rank at which plain LoRA on the same modules has as many numbers; below 1 no LoRA is as small."""
        return self.n_parameters / self.lora_per_rank if self.groups else 0.0


def check_modes(modes: Iterable[str]) -> tuple[str, ...]:
    """Return `modes` in canonical order.

    Raises:
        ConfigError: An entry is not a coordinate, or says again what `site` says.

    Example:
        >>> check_modes(["projection", "layer"]), check_modes("none")
        (('layer', 'projection'), ())
    """
    asked = (modes,) if isinstance(modes, str) else tuple(modes)
    asked = () if asked == ("none",) else asked
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
