"""The picture of `quality.py`: score against trained numbers, with the frontier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

_COLOURS = {"lotr": "#3b6fb6", "table": "#4f9d69", "lora": "#8a6fb0", "peft": "#d9822b"}
_NAMES = {
    "lotr": "LoTR",
    "table": "other rows of this library's table",
    "lora": "LoRA with this library's start",
    "peft": "PEFT",
}
#: Whose frontiers are drawn, and in the colour of which family.
_FRONTIERS = {"lotr": ("lotr", "table"), "peft": ("peft",)}


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw one point a method with the standard error of its score, and the frontiers of the library and of PEFT.

    Args:
        rows: Entries with `method`, `family`, `numbers`, `more` (steps beyond those of the others: such a point is
            hollow and in no frontier) and `test`, a score and its error. One without numbers is drawn as a line
            through all.
        title: Title of the picture.
        path: PNG file.
    """
    bare = [row for row in rows if not row["numbers"]]
    rows = [row for row in rows if row["numbers"]]
    figure = Figure(figsize=(9.6, 5.8), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.set_xscale("log")
    for kind, colour in _COLOURS.items():
        mine = [row for row in rows if row["family"] == kind]
        for more in (False, True):
            some = [row for row in mine if bool(row["more"]) == more]
            if some:
                sizes, scores = [row["numbers"] for row in some], [row["test"][0] for row in some]
                errors = [0.0 if math.isnan(row["test"][1]) else row["test"][1] for row in some]
                label = f"{_NAMES[kind]}, with more steps" if more else _NAMES[kind]
                face = {"mfc": "white"} if more else {}
                axis.errorbar(
                    sizes, scores, errors, fmt="o", ms=5, color=colour, elinewidth=1, label=label, **face
                )
    most = max(row["numbers"] for row in rows)
    for kind, families in _FRONTIERS.items():
        steps = list(frontier([row for row in rows if row["family"] in families and not row["more"]]))
        if steps:
            sizes, scores = zip(*steps, (most * 1.3, steps[-1][1]), strict=True)
            axis.plot(
                sizes, scores, drawstyle="steps-post", color=_COLOURS[kind], lw=1.6, alpha=0.55, zorder=1
            )
    for row in bare:
        axis.axhline(row["test"][0], color="#8a8f98", linestyle="--", lw=1, label=row["method"])
    axis.set_xlim(min(row["numbers"] for row in rows) / 1.6, most * 2.2)
    axis.margins(y=0.12)
    axis.set(
        xlabel="trained numbers, without the head", ylabel="test accuracy, mean over the tasks", title=title
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False)
    _label(figure, axis, rows)
    figure.savefig(path, metadata={"Software": None})


def frontier(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, float]]:
    """Yield size and score of the methods that are better than all smaller ones, the smallest first."""
    best = -math.inf
    for row in sorted(rows, key=lambda row: (row["numbers"], -row["test"][0])):
        if row["test"][0] > best:
            best = row["test"][0]
            yield row["numbers"], best


def _label(figure: Figure, axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Write the methods' names where nothing else is, as near to their points as that allows."""
    figure.draw_without_rendering()
    points = [axis.transData.transform((row["numbers"], row["test"][0])) for row in rows]
    taken = [axis.get_legend().get_window_extent()]
    for row, (x, y) in zip(rows, points, strict=True):
        error = 0.0 if math.isnan(row["test"][1]) else row["test"][1]
        top = axis.transData.transform((row["numbers"], row["test"][0] + error))[1]
        taken += [
            Bbox.from_bounds(x - 5, y - 5, 10, 10),
            Bbox.from_bounds(x - 2, 2 * y - top, 4, 2 * (top - y)),
        ]
    for row, (x, y) in sorted(zip(rows, points, strict=True), key=lambda pair: -pair[1][1]):
        text = axis.annotate(
            row["method"],
            (row["numbers"], row["test"][0]),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=8,
            color=_COLOURS[row["family"]],
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "#8a8f98", "lw": 0.5, "shrinkA": 0, "shrinkB": 4},
        )
        size = text.get_window_extent()
        for dx, dy in _around(size.width, size.height):
            box = Bbox.from_bounds(x + dx - size.width / 2, y + dy - size.height / 2, size.width, size.height)
            inside = (
                axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1 + 40 and axis.bbox.y0 < box.y0 < axis.bbox.y1
            )
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        text.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))


def _around(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield shifts of a label's centre, in pixels, the nearest first."""
    for ring in range(1, 24):
        for turn in (0.25, -0.25, 0.75, -0.75, 0.0, 1.0, 0.5, -0.5):  # in half turns, beside the lines first
            reach = 6 + 7 * (ring - 1)
            yield (
                math.cos(turn * math.pi) * (width / 2 + reach),
                math.sin(turn * math.pi) * (height / 2 + reach),
            )
