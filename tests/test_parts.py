from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from lotr.math.update import FactoredUpdate, side_by_side
from lotr.sharing.blocks import BLOCKS, Heads, Target
from lotr.sharing.groups import Group
from lotr.sharing.make_plan import make_plan
from lotr.sharing.plan import Plan

QKV = (("query", 8), ("key", 4), ("value", 4))
#: Every kind of weight: grouped-query heads, an output projection, a fused weight, long, wide and odd ones.
MODULES = {
    "q_proj": Target("", (8, 8), (2, 2), heads=Heads(2)),
    "k_proj": Target("", (4, 8), (2, 2), heads=Heads(2)),
    "o_proj": Target("", (8, 8), (2, 2), heads=Heads(2, axis=1)),
    "c_attn": Target("", (16, 8), (2, 2), fused=QKV, heads=Heads(2)),
    "up": Target("", (24, 8), (2, 2)),
    "down": Target("", (8, 24), (2, 2)),
    "odd": Target("", (7, 8), (2, 2)),
}
ALL = ("layer", "projection", "head")
SHARING = [(), ("layer",), ("projection",), ("layer", "projection"), ("site",)]


def _plan(modes: tuple[str, ...], blocks: str = "none", core: str = "free", names: str = "") -> Plan:
    chosen = names.split() or list(MODULES)
    targets = [replace(MODULES[name], path=f"h.{layer}.{name}") for layer in range(2) for name in chosen]
    return make_plan(targets, modes, core=core, blocks=blocks)


def _cases() -> list[tuple[tuple[str, ...], str]]:
    """Return all modes with all blocks that can go with them."""
    with_heads = [((*modes, "head"), "head") for modes in SHARING]
    return [*itertools.product(SHARING, BLOCKS), *with_heads]


@pytest.fixture(params=_cases(), ids=str)
def plan(request: pytest.FixtureRequest) -> Plan:
    return _plan(*request.param)


# ---- whatever is shared and however weights are cut


def test_parts_cover_modules_once_with_the_sites_of_one_group_and_have_names(plan: Plan) -> None:
    for target in plan.targets:
        covered, parts = torch.zeros(target.shape), plan.parts[target.path]
        for part in parts:
            (row, height), (column, width) = part.rows, part.columns
            covered[row : row + height, column : column + width] += 1
        assert covered.eq(1).all()
        names = [part.name for part in parts]
        assert len(set(names)) == len(names) and (names == ["weight"]) == (len(names) == 1)
        assert all("." not in name for name in names)
    held = [(part.group.name, site) for own in plan.parts.values() for part in own for site in part.sites]
    planned = [(group.name, site) for group in plan.groups for site in group.sites]
    assert len(held) == len(planned) and set(held) == set(planned)


def _numbers(group: Group) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return `U`, `V` and the cores of a group."""
    (o, i), (k, r) = group.shape, group.rank
    cores = {
        name: group.core.init(name, Generator().manual_seed(n)) for n, name in enumerate(group.core.shapes)
    }
    return torch.randn(o, k), torch.randn(i, r), cores


@pytest.mark.parametrize("core", ["free", "tucker", "cp", "tt"])
@pytest.mark.parametrize("modes, blocks", [case for case in _cases() if case[0]], ids=str)
def test_parts_give_the_update_that_the_sites_define(core: str, modes: tuple[str, ...], blocks: str) -> None:
    plan = _plan(modes, blocks, core)
    numbers = {group.name: _numbers(group) for group in plan.groups}
    for target in plan.targets:
        by_parts, by_sites = torch.zeros(2, *target.shape)
        for part in plan.parts[target.path]:
            U, V, cores = numbers[part.group.name]
            C = side_by_side(part.group.core.block(cores, part.region), part.grid)
            (row, height), (column, width) = part.rows, part.columns
            update = FactoredUpdate(U, C, V, 1.0, part.grid)
            by_parts[row : row + height, column : column + width] = update.dense()
        for group in plan.groups:
            U, V, cores = numbers[group.name]
            for site in (site for site in group.sites if site.module == target.path):
                (o, i) = site.shape
                at = tuple(slice(n, n + 1) for n in group.index[site])
                C = group.core.block(cores, at).reshape(group.core.k, group.core.r)
                by_sites[site.row : site.row + o, site.column : site.column + i] = U @ C @ V.T
        assert by_sites.any()
        torch.testing.assert_close(by_parts, by_sites)


# ---- what single modules become


@pytest.mark.parametrize(
    "module, modes, blocks, expected",
    [
        ("q_proj", ("layer",), "none", [("weight", (1, 1))]),
        ("q_proj", ("layer", "head"), "head", [("weight", (4, 1))]),
        ("o_proj", ("layer", "head"), "head", [("weight", (1, 4))]),
        ("q_proj", ("layer",), "head", [(f"head{n}", (1, 1)) for n in range(4)]),
        ("up", ("site",), "square", [("weight", (3, 1))]),
        ("down", ("site",), "square", [("weight", (1, 3))]),
        ("up", ("layer",), "square", [(str(n), (1, 1)) for n in range(3)]),
        ("c_attn", (), "none", [("weight", (1, 1))]),
        ("c_attn", ("layer",), "none", [("query", (1, 1)), ("key", (1, 1)), ("value", (1, 1))]),
        # keys and values are below each other and of one shape; queries are of another
        ("c_attn", ("site",), "none", [("query", (1, 1)), ("key", (2, 1))]),
        # eight heads below each other, but four and two and two of them are no grid of positions
        ("c_attn", ALL, "head", [("query", (4, 1)), ("key", (2, 1)), ("value", (2, 1))]),
        ("c_attn", ("site",), "head", [("weight", (8, 1))]),
    ],
)
def test_blocks_of_one_group_are_one_part_where_they_make_a_grid(
    module: str, modes: tuple[str, ...], blocks: str, expected: list[tuple[str, tuple[int, int]]]
) -> None:
    for parts in _plan(modes, blocks, names=module).parts.values():
        assert [(part.name, part.grid) for part in parts] == expected


def test_equal_heads_of_a_fused_weight_are_one_part_over_projections_and_heads() -> None:
    fused = tuple((name, 4) for name in ("query", "key", "value"))
    targets = [Target(f"h.{n}.c_attn", (12, 8), (2, 2), fused, Heads(2)) for n in range(2)]
    plan = make_plan(targets, ALL, core="cp", blocks="head")
    (part,) = plan.parts["h.1.c_attn"]
    assert part.grid == (6, 1) and part.region == (slice(1, 2), slice(0, 3), slice(0, 2))


def test_projections_of_one_shape_that_do_not_touch_are_parts_of_their_own() -> None:
    fused = (("query", 8), ("key", 4), ("value", 8))
    plan = make_plan([Target("c_attn", (20, 8), (2, 2), fused)], ("site",))
    parts = plan.parts["c_attn"]
    rows = {part.name: part.rows for part in parts}
    assert rows == {"query": (0, 8), "value": (12, 8), "key": (8, 4)}
