from __future__ import annotations

import pytest

from lotr.sharing.blocks import Heads, Shape, Site, Target, cut

QKV = (("query", 8), ("key", 4), ("value", 4))


def _cut(
    shape: Shape,
    blocks: str,
    heads: Heads | None = None,
    fused: tuple[tuple[str, int], ...] = (),
) -> list[Site]:
    return list(cut(Target("m", shape, (2, 2), fused=fused, heads=heads), "0", "m", blocks, True))


def _site(row: int, column: int, shape: Shape, piece: str = "", head: int | None = None) -> Site:
    return Site("m", "0", f"m.{piece}" if piece else "m", head, row, column, shape, piece)


@pytest.mark.parametrize(
    "shape, blocks, heads",
    [
        ((8, 6), "none", None),
        ((8, 6), "none", Heads(2)),  # heads are cut only where they are asked for
        ((8, 6), "head", None),  # a feed-forward weight has no heads
        ((8, 6), "square", None),  # 8 is no multiple of 6
        ((6, 6), "square", Heads(2)),
    ],
)
def test_a_weight_that_is_not_cut_is_one_block(shape: Shape, blocks: str, heads: Heads | None) -> None:
    assert _cut(shape, blocks, heads) == [_site(0, 0, shape)]


@pytest.mark.parametrize(
    "shape, heads, block, corners",
    [
        ((8, 6), Heads(2), (2, 6), [(0, 0), (2, 0), (4, 0), (6, 0)]),  # of a query: runs of rows
        ((6, 8), Heads(2, axis=1), (6, 2), [(0, 0), (0, 2), (0, 4), (0, 6)]),  # of an output: runs of columns
        ((4, 4), Heads(4), (4, 4), [(0, 0)]),  # one head is a head
        ((12, 4), None, (4, 4), [(0, 0), (4, 0), (8, 0)]),
        ((4, 12), None, (4, 4), [(0, 0), (0, 4), (0, 8)]),
    ],
)
def test_heads_are_runs_of_features_and_long_weights_numbered_squares(
    shape: Shape, heads: Heads | None, block: Shape, corners: list[Shape]
) -> None:
    expected = [
        _site(*corner, block, head=n) if heads else _site(*corner, block, str(n))
        for n, corner in enumerate(corners)
    ]
    assert _cut(shape, "head" if heads else "square", heads) == expected


def test_the_projections_of_a_fused_weight_are_its_pieces_from_the_first_row_on() -> None:
    assert _cut((16, 6), "none", fused=QKV) == [
        _site(0, 0, (8, 6), "query"),
        _site(8, 0, (4, 6), "key"),
        _site(12, 0, (4, 6), "value"),
    ]


@pytest.mark.parametrize(
    "shape, blocks, expected",
    [
        ((16, 6), "head", [*((f"query#{n}", 2 * n) for n in range(4)), ("key#0", 8), ("key#1", 10)]),
        ((16, 4), "square", [("query-0#None", 0), ("query-1#None", 4), ("key#None", 8), ("value#None", 12)]),
    ],
)
def test_blocks_of_a_fused_weight_are_counted_within_each_projection(
    shape: Shape, blocks: str, expected: list[tuple[str, int]]
) -> None:
    sites = _cut(shape, blocks, Heads(2), QKV)
    assert [(f"{site.piece}#{site.head}", site.row) for site in sites][: len(expected)] == expected


@pytest.mark.parametrize("blocks", ["none", "head", "square"])
@pytest.mark.parametrize("shape", [(16, 4), (16, 16), (16, 32), (16, 7)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fused", [(), QKV], ids=["one", "fused"])
def test_blocks_cover_every_number_once_in_reading_order(
    blocks: str, shape: Shape, axis: int, fused: tuple[tuple[str, int], ...]
) -> None:
    heads = Heads(2, axis) if shape[axis] % 2 == 0 else None
    found = _cut(shape, blocks, heads, fused)
    cells = [
        (row, column)
        for block in found
        for row in range(block.row, block.row + block.shape[0])
        for column in range(block.column, block.column + block.shape[1])
    ]
    assert len(cells) == shape[0] * shape[1] == len(set(cells))
    assert max(cells) == (shape[0] - 1, shape[1] - 1)
    assert found == sorted(found, key=lambda block: (block.row, block.column))
