from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lotr import Plan, PlanError
from lotr.sharing.blocks import Heads, Target
from lotr.sharing.make_plan import MODES, check_modes, make_plan

LAYER, BOTH, ALL = ("layer",), ("layer", "projection"), ("layer", "projection", "head")


def _plan(paths: list[str], modes: tuple[str, ...] = LAYER, **kwargs: object) -> Plan:
    return make_plan([Target(path, (8, 8), (2, 2)) for path in paths], modes, **kwargs)


# ---- groups


@pytest.mark.parametrize(
    "modes, sharing",
    [
        ((), [((p,), (), 1) for _ in range(3) for p in "qv"]),
        (LAYER, [(("q",), (3,), 3), (("v",), (3,), 3)]),
        (("projection",), [(("q", "v"), (2,), 2)] * 3),
        (BOTH, [(("q", "v"), (3, 2), 6)]),
        (("site",), [(("q", "v"), (6,), 6)]),
    ],
    ids=str,
)
def test_sites_share_along_the_modes(modes: tuple[str, ...], sharing: list[object]) -> None:
    groups = _plan([f"h.{n}.{p}" for n in range(3) for p in "qv"], modes).groups
    assert [(group.projections, group.core.sizes, len(group.sites)) for group in groups] == sharing
    assert len(dict.fromkeys(groups, 1)) == len(groups), "a group can be a key"
    *_, (site, index) = groups[-1].index.items()
    assert site.module == "h.2.v"
    assert index == {(): (), LAYER: (2,), ("projection",): (1,), BOTH: (2, 1), ("site",): (5,)}[modes]


@pytest.mark.parametrize(
    "modes", [(), *([mode] for mode in MODES), BOTH, ALL, ("site", "head"), (*BOTH, "expert")], ids=str
)
def test_the_order_of_modes_is_that_of_the_core_and_changes_no_sharing(modes: tuple[str, ...]) -> None:
    targets = [Target(f"h.{n}.{p}", (8, 8), (2, 2), heads=Heads(2)) for n in range(2) for p in "qkv"]
    blocks = "head"
    if "expert" in modes:
        targets, blocks = [replace(target, heads=None, experts=4) for target in targets], "none"
    for order in itertools.permutations(modes):
        plan, same = make_plan(targets, order, blocks=blocks), make_plan(targets, modes, blocks=blocks)
        assert [group.sites for group in plan.groups] == [group.sites for group in same.groups]
        assert all(group.modes == order for group in plan.groups)
        for group, other in zip(plan.groups, same.groups, strict=True):
            places = [order.index(mode) for mode in modes]
            assert all(
                tuple(index[at] for at in places) == other.index[site] for site, index in group.index.items()
            )
    assert check_modes(set(modes)) == tuple(mode for mode in MODES if mode in modes)


def test_group_names_are_unique_without_dots_and_without_the_prefix() -> None:
    names = [group.name for group in _plan(["a.b-c.q", "a-b.c.q", "h.lotr_x.q"], ()).groups]
    assert len(set(names)) == 3
    assert all("." not in name and "lotr_" not in name and name.endswith("_8x8") for name in names)


# ---- heads


def _grouped(modes: tuple[str, ...]) -> Plan:
    """Queries have four heads, keys and values two."""
    heights = {"q": 8, "k": 4, "v": 4}
    targets = [
        Target(f"h.{n}.{p}", (o, 6), (2, 2), heads=Heads(2)) for n in range(2) for p, o in heights.items()
    ]
    return make_plan(targets, modes, blocks="head")


def test_projections_of_unequal_width_share_head_by_head() -> None:
    (group,) = _grouped(ALL).groups
    assert group.shape == (2, 6) and group.core.sizes == (2, 3, 4) and len(group.sites) == 2 * (4 + 2 + 2)
    assert group.n_cores == 16 * 2 * 2  # of the 24 places, 8 have no site
    indices = {site.module: [] for site in group.sites}
    for site, index in group.index.items():
        indices[site.module].append(index)
    assert indices["h.1.q"] == [(1, 0, head) for head in range(4)]
    assert indices["h.1.v"] == [(1, 2, head) for head in range(2)]


def test_heads_that_are_no_mode_share_with_the_same_head_of_other_layers() -> None:
    groups = _grouped(LAYER).groups
    assert len(groups) == 4 + 2 + 2
    assert all(len({(site.projection, site.head) for site in group.sites}) == 1 for group in groups)
    assert all([site.layer for site in group.sites] == ["h.0", "h.1"] for group in groups)


def test_along_sites_and_heads_a_module_is_a_site() -> None:
    targets = [Target(f"h.0.{p}", (8, 6), (2, 2), heads=Heads(2)) for p in "qv"]
    (group,) = make_plan(targets, ("site", "head"), blocks="head").groups
    assert group.core.sizes == (2, 4)
    index = {(site.module, site.head): at for site, at in group.index.items()}
    assert index == {(f"h.0.{p}", head): (n, head) for n, p in enumerate("qv") for head in range(4)}


def test_heads_that_are_columns_do_not_share_with_heads_that_are_rows() -> None:
    targets = [Target(f"h.0.{p}", (8, 8), (2, 2), heads=Heads(2, axis)) for p, axis in (("q", 0), ("o", 1))]
    rows, columns = make_plan(targets, ("head",), blocks="head").groups
    assert (rows.shape, columns.shape) == ((2, 8), (8, 2))


def test_a_fused_weight_shares_as_its_projections_would() -> None:
    fused = tuple((p, 8) for p in ("q", "k", "v"))
    whole = make_plan([Target(f"h.{n}.qkv", (24, 8), (2, 2), fused) for n in range(2)], LAYER)
    apart = _plan([f"h.{n}.{p}" for n in range(2) for p in ("q", "k", "v")])
    assert [group.shape for group in whole.groups] == [group.shape for group in apart.groups]
    assert [group.projections for group in whole.groups] == [("qkv.q",), ("qkv.k",), ("qkv.v",)]
    assert whole.n_parameters == apart.n_parameters


# ---- unequal blocks


def _unequal(unequal: str, **shapes: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[str, ...]]]:
    targets = [
        Target(f"h.{n}.{p}", shape, (2, 2), attention=p in "qkv")
        for n in (0, 1)
        for p, shape in shapes.items()
    ]
    return [(group.shape, group.projections) for group in make_plan(targets, BOTH, unequal=unequal).groups]


def test_grouped_queries_share_with_the_query_and_with_what_is_as_large() -> None:
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "up": (16, 8), "down": (8, 16)}
    apart = [((16, 8), ("up",)), ((8, 16), ("down",))]
    assert _unequal("grouped_query", **shapes) == [((8, 8), ("q", "k", "v", "o")), *apart]
    assert _unequal("separate", **shapes) == [((8, 8), ("q", "o")), ((4, 8), ("k", "v")), *apart]
    assert _unequal("slice", **shapes) == [((16, 16), tuple(shapes))]
    law = r'"q\|k\|v\|o\|up\|down" cannot share factors: their blocks are .* Shared factors need equal blocks\. '
    with pytest.raises(PlanError, match=rf'{law}Split by head .*drop "projection".*unequal="slice"'):
        _unequal("error", **shapes)


@pytest.mark.parametrize("shape", [(8, 6), (4, 6), (8, 3), (4, 3)], ids=str)
def test_a_narrower_site_uses_the_first_rows_times_the_root_of_the_share(shape: tuple[int, int]) -> None:
    targets = [Target("h.0.q", (8, 6), (2, 2)), Target("h.0.k", shape, (2, 2))]
    plan = make_plan(targets, BOTH, unequal="slice")
    U, C, V = torch.randn(8, 2), torch.randn(2, 2), torch.randn(6, 2)
    (part,) = plan.parts["h.0.k"]
    gain = (8 / shape[0] * 6 / shape[1]) ** 0.5
    expected = 0.5 * gain * U[: shape[0]] @ C @ V[: shape[1]].T
    torch.testing.assert_close(part.factored(U, C, V, 0.5).dense(), expected)
    assert torch.equal(part.cores(part.lay(C[None])), C[None])


def test_squares_and_heads_are_two_tensors_and_tall_weights_are_transposed() -> None:
    shapes = {"q": (8, 8), "o": (8, 8), "up": (32, 8), "down": (8, 32)}
    heads = {"q": Heads(2), "o": Heads(2, axis=1)}
    targets = [Target(f"h.{n}.{p}", s, (2, 2), heads=heads.get(p)) for n in (0, 1) for p, s in shapes.items()]
    by_head, squares = make_plan(targets, ("site", "head"), core="cp", blocks="head_or_square").groups
    assert (by_head.shape, by_head.core.sizes) == ((2, 8), (2, 4))
    assert (squares.shape, squares.core.sizes, squares.modes) == ((8, 8), (2 * (1 + 4 + 4),), ("site",))
    assert {site.projection.partition(".")[0] for site in squares.sites if site.transposed} == {"o", "up"}


def test_an_output_projection_cut_by_rows_shares_with_the_query() -> None:
    shapes = {"q": Heads(2), "o": Heads(2, axis=1)}
    targets = [Target(f"h.0.{p}", (8, 8), (2, 2), heads=heads) for p, heads in shapes.items()]
    (group,) = make_plan(targets, ALL, core="cp", blocks="head_rows").groups
    assert group.shape == (2, 8) and group.core.sizes == (1, 2, 4)


# ---- refusals


def test_unequal_ranks_in_a_group_are_refused() -> None:
    targets = [Target("h.0.q", (8, 8), (2, 2)), Target("h.1.q", (8, 8), (4, 4))]
    with pytest.raises(PlanError, match=r'"h.0.q" asks for rank \(2, 2\) and "h.1.q" for rank \(4, 4\)'):
        make_plan(targets, LAYER)


@pytest.mark.parametrize(
    "rank, core, cut",
    [
        ((9, 9), "free", (6, 6)),  # one number stays one
        ((7, 7), "identity", (6, 6)),
        ((9, 2), "free", (8, 2)),
        ((2, 7), "free", (2, 6)),
        ((6, 6), "free", (6, 6)),
    ],
    ids=str,
)
def test_a_rank_above_the_block_is_cut_to_it(rank: tuple[int, int], core: str, cut: tuple[int, int]) -> None:
    plan = make_plan([Target("h.0.q", (8, 6), rank)], () if core == "identity" else LAYER, core=core)
    (group,) = plan.groups
    assert group.rank == cut and group.asked_rank == rank
    assert bool(plan.cut_ranks) == (cut != rank) == ("(cut)" in str(plan))


def test_ranks_are_cut_group_by_group_and_said_in_one_sentence() -> None:
    plan = make_plan(
        [Target(f"h.{n}.{p}", (o, 8), (6, 6)) for n in range(2) for p, o in (("q", 8), ("k", 4))], LAYER
    )
    assert {group.name: group.rank for group in plan.groups} == {"q_8x8": (6, 6), "k_4x8": (4, 4)}
    assert plan.cut_ranks == "Rank 6 is cut to the size of the block where that is smaller: k_4x8 has 4."


def test_a_plan_prints_as_a_table() -> None:
    lines = str(_plan([f"h.{n}.{p}" for n in range(3) for p in "qv"])).splitlines()
    assert lines[0].split() == ["group", "shares", "sites", "block", "rank", "numbers", "bytes"]
    assert lines[1].split() == ["q_8x8", "layer", "3", "8×8", "2", "44", "176"]
    assert lines[3].startswith("88 trained numbers, 352 bytes in float32, for 6 sites in 6 modules")


def test_sharing_along_heads_is_refused_where_there_are_none() -> None:
    with pytest.raises(PlanError, match=r'No module has attention heads.* drop "head" from modes'):
        _plan(["h.0.up", "h.1.up"], ("layer", "head"), blocks="head")
