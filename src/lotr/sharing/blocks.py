"""How one weight is cut into sites: fused projections, attention heads, squares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, int]

#: `none`: a weight, or each projection of a fused one, is one block. `head`: one block an attention head.
#: `square`: a matrix whose longer side is a multiple of the shorter is cut into squares.
BLOCKS = ("none", "head", "square")


@dataclass(frozen=True)
class Heads:
    """Attention heads of a weight: heads are `size` features each, contiguous, feature `h·size + j` is head `h`'s.

    Args:
        size: Features of one head.
        axis: 0 where the heads are rows (query, key, value), 1 where they are columns (the output projection).
    """

    size: int
    axis: int = 0


@dataclass(frozen=True)
class Target:
    """A module that is to be adapted, as the planner is told of it.

    Args:
        path: Path of the module in its model.
        shape: `(out, in)` features.
        rank: `(k, r)` asked for.
        fused: Name and output features of each projection of a fused weight, from the first row on.
        heads: Its attention heads, when it has any.
    """

    path: str
    shape: Shape
    rank: Shape
    fused: tuple[tuple[str, int], ...] = ()
    heads: Heads | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without what says nothing.

        Example:
            >>> Target("h.0.q", (8, 8), (2, 2)).to_dict()
            {'path': 'h.0.q', 'shape': [8, 8], 'rank': [2, 2]}
        """
        said: dict[str, Any] = {"path": self.path, "shape": list(self.shape), "rank": list(self.rank)}
        if self.fused:
            said["fused"] = [list(piece) for piece in self.fused]
        if self.heads:
            said["heads"] = [self.heads.size, self.heads.axis]
        return said

    @staticmethod
    def from_dict(said: dict[str, Any]) -> Target:
        """Return the target that `to_dict` described."""
        (out, width), (k, r) = said["shape"], said["rank"]
        fused = tuple((str(name), int(rows)) for name, rows in said.get("fused", ()))
        heads = Heads(*said["heads"]) if "heads" in said else None
        return Target(str(said["path"]), (out, width), (k, r), fused, heads)


@dataclass(frozen=True)
class Block:
    """A block of a weight.

    Args:
        row: First output feature.
        column: First input feature.
        shape: `(o, i)`.
        piece: What tells its projection from others of the module: of a fused one, or a square; may be empty.
        head: Number of the attention head, when the weight is cut by heads.
    """

    row: int
    column: int
    shape: Shape
    piece: str = ""
    head: int | None = None


def cut(target: Target, blocks: str, split_fused: bool) -> Iterator[Block]:
    """Cut a weight into blocks, from the first row on and in a row from the first column on.

    Args:
        target: The module.
        blocks: One of `BLOCKS`.
        split_fused: Whether the projections of a fused weight are blocks of their own.

    Example:
        >>> fused = Target("c_attn", (12, 4), (2, 2), fused=(("query", 4), ("key", 4), ("value", 4)), heads=Heads(2))
        >>> [block.piece for block in cut(fused, "none", split_fused=True)]
        ['query', 'key', 'value']
        >>> [(block.piece, block.head, block.row) for block in cut(fused, "head", split_fused=True)][2:4]
        [('key', 0, 4), ('key', 1, 6)]
    """
    out, width = target.shape
    start = 0
    for name, height in target.fused if split_fused and target.fused else (("", out),):
        (a, b), head = _grid(height, width, blocks, target.heads)
        shape = (height // a, width // b)
        for n in range(a * b):
            row, column = divmod(n, b)
            number = "" if head or a * b == 1 else str(n)
            yield Block(
                row=start + row * shape[0],
                column=column * shape[1],
                shape=shape,
                piece="-".join(part for part in (name, number) if part),
                head=n if head else None,
            )
        start += height


def _grid(height: int, width: int, blocks: str, heads: Heads | None) -> tuple[Shape, bool]:
    """Return blocks down and across, and whether they are heads."""
    if blocks == "head" and heads is not None:
        return ((height // heads.size, 1) if heads.axis == 0 else (1, width // heads.size)), True
    if blocks == "square":
        side = min(height, width)
        if max(height, width) % side == 0:
            return (height // side, width // side), False
    return (1, 1), False
