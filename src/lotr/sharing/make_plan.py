"""Which sites share what: modules' names and shapes in, a frozen plan out. Nothing here sees a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..errors import ConfigError, PlanError
from ..math.cores import CORES, Index
from .blocks import Site, Target, cut
from .groups import Group, block_of
from .paths import coordinates, run_of
from .plan import Plan

Rank = tuple[int, int]  # (k, r)

#: What sites of unequal shape do that would share: query, key and value share and others keep apart; all share; all
#: keep apart; they are refused.
UNEQUAL = ("grouped_query", "slice", "separate", "error")

#: The coordinates along which sites can share factors. `site` is all of them in one, or layer and projection in one
#: beside `head` and `expert`. `task` is one in an adapter, and any number in a bank on it.
MODES = ("site", "layer", "projection", "head", "expert", "task")


def make_plan(
    targets: Sequence[Target],
    modes: Iterable[str],
    core: str = "free",
    blocks: str = "none",
    unequal: str = "grouped_query",
    core_ranks: int | dict[str, int] | None = None,
    magnitude: str = "none",
    trainable: str = "all",
    layers_pattern: Iterable[str] = (),
    layers_per_group: int | None = None,
) -> Plan:
    """Cut the targets into sites, and the sites into groups that share factors.

    Sites are in one group when all coordinates outside `modes` agree and their blocks have equal shape, or are unequal
    in a way that `unequal` lets share: then the factors are as large as the largest block. A fused weight is cut into
    its projections wherever anything is shared (`modes` is not empty). Experts that one parameter holds share factors
    where layers do, so `"layer"` among the modes brings `"expert"` along. A rank above the size of a group's block is
    cut to it.

    Args:
        targets: The modules to adapt, in model order.
        modes: Coordinates along which sites share: any of `MODES`, in any order.
        core: Structure of the cores, a key of `CORES`.
        blocks: How weights are cut, one of `BLOCKS`.
        unequal: What sites of unequal shape do, one of `UNEQUAL`.
        core_ranks: Rank of every mode, or of each by name; default: `r`, at most the mode's extent.
        magnitude: Rule on every module, a key of `MAGNITUDES`.
        trainable: `"all"` or `"cores"`.
        layers_pattern: Names of the module lists whose number is the layer; default: found from the paths.
        layers_per_group: How many layers in order share factors, where layers do, by the first number of a path;
            default: all.

    Returns:
        The plan.

    Raises:
        PlanError: Sites cannot share as `modes` ask.
    """
    modes = check_modes(modes)
    has_experts = any(target.experts for target in targets)
    if "layer" in modes and has_experts:
        modes = check_modes((*modes, "expert"))
    layers = coordinates([target.path for target in targets], tuple(layers_pattern))
    families: dict[tuple[object, ...], list[Site]] = defaultdict(list)
    for target in targets:
        for site in cut(target, *layers[target.path], blocks, split_fused=bool(modes)):
            families[(*_fixed(site, modes, layers_per_group), _family(site, unequal))].append(site)
    members: dict[tuple[object, ...], list[Site]] = defaultdict(list)
    for (*fixed, _), family in families.items():
        shapes = dict.fromkeys(site.shape for site in family)
        if unequal == "error" and len(shapes) > 1:
            raise _unequal(family)
        members[(*fixed, tuple(map(max, zip(*shapes, strict=True))))] += family

    ranks = {target.path: target.rank for target in targets}
    names: set[str] = set()
    stems = ("-".join(_fixed(sites[0], modes, layers_per_group)) for sites in members.values())
    groups = [
        _group(stem or "joint", sites, modes, core, core_ranks, ranks, names)
        for stem, sites in zip(stems, members.values(), strict=True)
    ]
    if "expert" in modes and targets and not has_experts:
        raise PlanError(
            f'modes={modes!r} names "expert", and no adapted parameter holds experts. Name such parameters in '
            'target_parameters, or drop "expert" from modes.'
        )
    _check_sharing(groups, modes, blocks)
    return Plan(tuple(groups), tuple(targets), magnitude, trainable)


def _family(site: Site, unequal: str) -> object:
    """Return what sites have in common that share whatever their shapes are."""
    if unequal in ("slice", "error"):
        return None
    if unequal == "grouped_query" and site.attention and site.head is None:
        return "attention", site.shape[1]
    return site.shape


def _fixed(site: Site, modes: tuple[str, ...], layers_per_group: int | None) -> list[str]:
    """Return the coordinates that tell the site's group from others."""
    names = [] if "site" in modes else [name for name in ("layer", "projection") if name not in modes]
    fixed = [str(getattr(site, name)) for name in names]
    alone = () if "site" in modes else ("head", "expert")
    numbers = {name: getattr(site, name) for name in alone if name not in modes}
    if layers_per_group is not None and {"layer", "site"} & set(modes):
        fixed.append(run_of(site.module, layers_per_group))
    return [*fixed, *(f"{name}{number}" for name, number in numbers.items() if number is not None)]


def _group(
    stem: str,
    sites: list[Site],
    modes: tuple[str, ...],
    core: str,
    core_ranks: int | dict[str, int] | None,
    ranks: dict[str, Rank],
    names: set[str],
) -> Group:
    """Return the group of some sites, with a name that begins with the stem and is not among `names` yet."""
    stem = stem.replace(".", "-").replace("lotr_", "lotr-")
    if modes != ("head",) and all(site.head is None for site in sites):  # feed-forward weights have no heads
        modes = tuple(mode for mode in modes if mode != "head")
    if modes != ("expert",) and all(site.expert is None for site in sites):
        modes = tuple(mode for mode in modes if mode != "expert")
    o, i = shape = block_of(sites)
    name, n = f"{stem}_{o}x{i}", 1
    while name in names:
        n += 1
        name = f"{stem}~{n}_{o}x{i}"
    names.add(name)
    rank = _common_rank(name, sites, ranks)
    k, r = _cut_rank(rank, shape, core)

    axes = [{c: n for n, c in enumerate(dict.fromkeys(s.coordinate(m, modes) for s in sites))} for m in modes]
    index = {
        site: tuple(axis[site.coordinate(mode, modes)] for axis, mode in zip(axes, modes, strict=True))
        for site in sites
    }
    sizes = tuple(len(axis) for axis in axes)
    mode_ranks: Index = ()
    if CORES[core].has_ranks:
        given = core_ranks if isinstance(core_ranks, dict) else dict.fromkeys(modes, core_ranks)
        mode_ranks = tuple(given.get(m) or min(r, size) for m, size in zip(modes, sizes, strict=True))
    task = modes.index("task") if "task" in modes else None
    structure = CORES[core](k=k, r=r, sizes=sizes, ranks=mode_ranks, task=task)
    return Group(name, modes, tuple(sites), structure, index, rank)


def _common_rank(name: str, sites: list[Site], ranks: dict[str, Rank]) -> Rank:
    """Return the one rank `(k, r)` that the modules of a group ask for."""
    modules = {ranks[site.module]: site.module for site in sites}
    if len(modules) > 1:
        (a, one), (b, other) = list(modules.items())[:2]
        raise PlanError(
            f'Sites of group "{name}" cannot share factors: "{one}" asks for rank {a} and "{other}" for rank '
            f"{b}. Shared factors need one rank. Give every site of the group the same rank in rank_pattern, "
            "or drop a mode so that they fall into separate groups."
        )
    return next(iter(modules))


def _cut_rank(rank: Rank, block: Rank, core: str) -> Rank:
    """Return a rank that is at most as large as the block: one number stays one, of a pair each side is cut alone."""
    k, r = min(rank[0], block[0]), min(rank[1], block[1])
    one = rank[0] == rank[1] or CORES[core].is_square
    return (min(k, r), min(k, r)) if one else (k, r)


def _check_sharing(groups: list[Group], modes: tuple[str, ...], blocks: str) -> None:
    """Refuse a plan in which a mode that was asked for brings nothing together anywhere."""
    if not groups:  # a head alone
        return
    if blocks.startswith("head") and all(site.head is None for group in groups for site in group.sites):
        shared = ', and drop "head" from modes' if "head" in modes else ""
        raise PlanError(
            'No module has attention heads, so blocks="head" cuts nothing. Adapt query, key, value or output '
            f'projections, or use blocks="none"{shared}.'
        )
    projections = {p for group in groups for p in group.projections}
    together = any(len(group.projections) > 1 for group in groups)
    if "projection" in modes and len(projections) > 1 and not together:
        raise _unequal(site for group in groups for site in group.sites)


def _unequal(sites: Iterable[Site]) -> PlanError:
    shapes = {site.projection: site.shape for site in sites}
    unlike = " and ".join(str(shape) for shape in dict.fromkeys(shapes.values()))
    if len(set(shapes.values())) == 1:
        return PlanError(
            f'Projections "{"|".join(shapes)}" of one layer would share factors, and no layer has two of them. Add '
            '"layer" to modes, or adapt more projections.'
        )
    return PlanError(
        f'Sites of projections "{"|".join(shapes)}" cannot share factors: their blocks are {unlike}. '
        'Shared factors need equal blocks. Split by head (blocks="head"), drop "projection" from modes '
        '(method="lotr"), adapt projections of equal shape, or let narrower ones use the first rows (unequal="slice").'
    )


def check_modes(modes: Iterable[str]) -> tuple[str, ...]:
    """Return `modes` in the order that was given, which is that of a tensor train from the output to the input.

    Raises:
        ConfigError: An entry is not a coordinate, or says again what `site` says.

    Example:
        >>> check_modes(["projection", "layer"]), check_modes("none")
        (('projection', 'layer'), ())
    """
    names = (modes,) if isinstance(modes, str) else tuple(modes)
    if isinstance(modes, set | frozenset):  # which has no order
        names = tuple(mode for mode in MODES if mode in modes) + tuple(modes - set(MODES))
    names = () if names == ("none",) else names
    unknown = [mode for mode in names if mode not in MODES]
    if unknown:
        raise ConfigError(
            f"modes={names!r} names {unknown[0]!r}, which is not a coordinate. Known: {', '.join(MODES)}."
        )
    if "site" in names and {"layer", "projection"} & set(names):
        raise ConfigError(
            f'modes={names!r} names "site", which is layer and projection in one, beside one of them. Drop "site", '
            "or the others."
        )
    return tuple(dict.fromkeys(names))
