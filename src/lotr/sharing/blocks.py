"""How one weight is cut into sites: fused projections, attention heads, squares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, int]

#: `none`: a weight, or each projection of a fused one, is one block. `head`: one block an attention head.
#: `head_rows`: the same, and the output projection is cut by rows too, as the query is. `square`: a matrix whose longer
#: side is a multiple of the shorter is cut into squares. `head_or_square`: query, key and value are cut by heads, every
#: other weight into squares, which are transposed in all but wide weights.
BLOCKS = ("none", "head", "head_rows", "square", "head_or_square")


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
    """A module that is to be adapted.

    Args:
        path: Path of the module in its model.
        shape: `(out, in)` features.
        rank: `(k, r)` asked for; the groups of the module cut it to their blocks.
        fused: Name and output features of each projection of a fused weight, from the first row on.
        heads: Its attention heads, when it has any.
        attention: Whether it is query, key or value, which grouped queries make unequal.
        experts: Number of experts that one parameter holds below each other, `shape[0] / experts` output features each.
        bias: Whether its bias trains too.
    """

    path: str
    shape: Shape
    rank: Shape
    fused: tuple[tuple[str, int], ...] = ()
    heads: Heads | None = None
    attention: bool = False
    experts: int = 0
    bias: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape `(out, in)`, or `(experts, out, in)` where one parameter holds experts."""
        out, width = self.shape
        return (self.experts, out // self.experts, width) if self.experts else self.shape

    @property
    def lora_per_rank(self) -> int:
        """Numbers that plain LoRA has here at rank 1: `in + out`, of every expert."""
        out, width = self.shape
        return out + width * (self.experts or 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the fields that are empty.

        Example:
            >>> Target("h.0.q", (8, 8), (2, 2)).to_dict()
            {'path': 'h.0.q', 'shape': [8, 8], 'rank': [2, 2]}
        """
        plain = {**vars(self), "shape": list(self.shape), "rank": list(self.rank)}
        plain["fused"] = [list(piece) for piece in self.fused]
        plain["heads"] = self.heads and [self.heads.size, self.heads.axis]
        return {name: value for name, value in plain.items() if value}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Target:
        """Return the target that `to_dict` described."""
        (out, width), (k, r) = fields["shape"], fields["rank"]
        fused = tuple((str(name), int(rows)) for name, rows in fields.get("fused", ()))
        heads = Heads(*fields["heads"]) if "heads" in fields else None
        attention, experts = bool(fields.get("attention")), int(fields.get("experts", 0))
        bias = bool(fields.get("bias"))
        return Target(str(fields["path"]), (out, width), (k, r), fused, heads, attention, experts, bias)


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
        piece: Name of its projection within a fused module, or number of its square; may be empty.
        attention: Whether it is of a query, key or value.
        transposed: Whether its update is `V C_sᵀ Uᵀ` in place of `U C_s Vᵀ`.
        expert: Number of its expert, when one parameter holds several.
        bias: Whether the bias of its rows trains too; of sites side by side the first has it, those of heads never.
    """

    module: str
    layer: str
    projection: str
    head: int | None
    row: int
    column: int
    shape: Shape
    piece: str = ""
    attention: bool = False
    transposed: bool = False
    expert: int | None = None
    bias: bool = False

    @property
    def bias_name(self) -> str:
        """Name in its group of what is added to the bias of its rows; PEFT trains whatever has "bias" in its name."""
        return f"b-{self.projection}".replace(".", "-").replace("lotr_", "lotr-")

    def coordinate(self, mode: str, modes: tuple[str, ...]) -> object:
        """Return the site's coordinate along a mode, given the modes beside it."""
        if mode == "site":
            expert = None if "expert" in modes else self.expert
            return (self.module, self.projection, expert) if {"head", "expert"} & set(modes) else self
        return 0 if mode == "task" else getattr(self, mode)


def cut(target: Target, layer: str, projection: str, blocks: str, split_fused: bool) -> Iterator[Site]:
    """Cut a weight into sites, from the first row on and in a row from the first column on.

    Args:
        target: The module.
        layer: Path of its layer.
        projection: Name of its projection; pieces of the weight add theirs.
        blocks: One of `BLOCKS`.
        split_fused: Whether the projections of a fused weight are sites of their own.

    Example:
        >>> fused = Target("c_attn", (12, 4), (2, 2), fused=(("query", 4), ("key", 4), ("value", 4)), heads=Heads(2))
        >>> [site.projection for site in cut(fused, "h.0", "c_attn", "none", split_fused=True)]
        ['c_attn.query', 'c_attn.key', 'c_attn.value']
        >>> [(site.piece, site.head, site.row) for site in cut(fused, "h.0", "c_attn", "head", split_fused=True)][2:4]
        [('key', 0, 4), ('key', 1, 6)]
    """
    out, width = target.shape
    for n in range(target.experts):
        shape = (out // target.experts, width)
        yield Site(target.path, layer, projection, None, n * shape[0], 0, shape, expert=n)
    if target.experts:
        return
    start = 0
    for name, height in target.fused if split_fused and target.fused else (("", out),):
        (a, b), is_head = _grid(height, width, blocks, target.heads)
        shape = (height // a, width // b)
        for n in range(a * b):
            row, column = divmod(n, b)
            number = "" if is_head or a * b == 1 else str(n)
            piece = "-".join(part for part in (name, number) if part)
            yield Site(
                module=target.path,
                layer=layer,
                projection=f"{projection}.{piece}" if piece else projection,
                head=n if is_head else None,
                row=start + row * shape[0],
                column=column * shape[1],
                shape=shape,
                piece=piece,
                attention=target.attention,
                transposed=blocks == "head_or_square" and not is_head and shape[0] == shape[1] and b == 1,
                bias=target.bias and not is_head and column == 0,
            )
        start += height


def _grid(height: int, width: int, blocks: str, heads: Heads | None) -> tuple[Shape, bool]:
    """Return blocks down and across, and whether they are heads."""
    if heads is not None:
        by_rows = heads.axis == 0 or (blocks == "head_rows" and height % heads.size == 0)
        if by_rows and blocks.startswith("head"):
            return (height // heads.size, 1), True
        if blocks in ("head", "head_rows"):
            return (1, width // heads.size), True
    if blocks.endswith("square"):
        side = min(height, width)
        if max(height, width) % side == 0:
            return (height // side, width // side), False
    return (1, 1), False
