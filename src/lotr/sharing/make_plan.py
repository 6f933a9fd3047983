"""Which sites share what: modules' names and shapes in, a frozen plan out. Nothing here sees a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..errors import PlanError
from ..math.cores import CORES, Index
from .blocks import Target, cut
from .paths import coordinates
from .plan import Group, Plan, Site, check_modes


def make_plan(
    targets: Sequence[Target],
    modes: Iterable[str],
    core: str = "free",
    blocks: str = "none",
    core_ranks: int | dict[str, int] | None = None,
    magnitude: str = "none",
    trainable: str = "all",
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
        trainable: `"all"` or `"cores"`.
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
    _check_sharing(groups, modes, blocks)
    return Plan(tuple(groups), tuple(targets), magnitude, trainable)


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
            f"at most {o} and r at most {i}. Use r=({min(k, o)}, {min(r, i)}) (--rank {min(k, o)},{min(r, i)}); in "
            f'Python also a smaller rank for "{sites[0].projection}" in rank_pattern, or exclude_modules.'
        )


def _check_sharing(groups: list[Group], modes: tuple[str, ...], blocks: str) -> None:
    """Refuse a plan in which a mode that was asked for brings nothing together anywhere."""
    if not groups:  # a head alone
        return
    if blocks == "head" and all(site.head is None for group in groups for site in group.sites):
        shared = ', and drop "head" from modes' if "head" in modes else ""
        raise PlanError(
            'No module has attention heads, so blocks="head" cuts nothing. Adapt query, key, value or output '
            f'projections, or use blocks="none"{shared}.'
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
