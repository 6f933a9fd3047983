"""Pictures of the documents: scores against trained numbers, with the names beside the points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

COLOURS = {"this library": "#3b6fb6", "PEFT": "#c96a12"}
_GREY = "#8a8f98"
_PLAIN = {"Software": None}  # without a version in it, equal content gives equal bytes


@dataclass(frozen=True)
class Point:
    """A method in a picture.

    Args:
        label: Written beside the point; none if empty.
        method: Points of one method are joined by a line.
        numbers: Trained numbers; a method without any is a line through all.
        score: In percent.
        error: Its standard error.
        whose: A key of `COLOURS`.
    """

    label: str
    method: str
    numbers: int
    score: float
    error: float
    whose: str


def scores(panels: dict[str, Sequence[Point]], axis: str, path: Path) -> None:
    """Draw panels under each other, each with its title.

    Args:
        panels: Points of each, by title.
        axis: Label of the score.
        path: PNG file.
    """
    figure = Figure(figsize=(8, 5.2 * len(panels)), dpi=160, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, points) in zip(grid, panels.items(), strict=True):
        _panel(axes, points, title, axis)
    figure.draw_without_rendering()
    for axes, points in zip(grid, panels.values(), strict=True):
        _label(figure, axes, [point for point in points if point.numbers])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata=_PLAIN)


def _panel(axes: Any, points: Sequence[Point], title: str, axis: str) -> None:
    axes.set_xscale("log")
    for whose, colour in COLOURS.items():
        mine = [point for point in points if point.whose == whose and point.numbers]
        if mine:
            sizes, values = [point.numbers for point in mine], [point.score for point in mine]
            errors = [0.0 if math.isnan(point.error) else point.error for point in mine]
            axes.errorbar(sizes, values, errors, fmt="o", ms=6, color=colour, elinewidth=1.2, label=whose)
    for method in {point.method for point in points}:
        mine = sorted((point.numbers, point.score, point.whose) for point in points if point.method == method)
        axes.plot(*zip(*[some[:2] for some in mine], strict=True), color=COLOURS[mine[0][2]], lw=1, alpha=0.4)
    for point in points:
        if not point.numbers:
            axes.axhline(point.score, color=_GREY, linestyle="--", lw=1.2, label=point.label)
    sizes = [point.numbers for point in points if point.numbers]
    axes.set_xlim(min(sizes) / 2.5, max(sizes) * 3.5)
    between = (1, 2, 5) if max(sizes) < 50 * min(sizes) else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=between))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.15)
    axes.set_xlabel("trained numbers, without the head", fontsize=13)
    axes.set_ylabel(axis, fontsize=13)
    axes.set_title(title, fontsize=15, loc="left")
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=14)


def _label(figure: Figure, axes: Any, points: Sequence[Point]) -> None:
    """Write the names where nothing else is, as near to their points as that allows."""
    centres = [axes.transData.transform((point.numbers, point.score)) for point in points]
    taken = [axes.get_legend().get_window_extent()]
    for point, (x, y) in zip(points, centres, strict=True):
        error = 0.0 if math.isnan(point.error) else point.error
        height = axes.transData.transform((point.numbers, point.score + error))[1] - y
        taken += [Bbox.from_bounds(x - 8, y - 8, 16, 16), Bbox.from_bounds(x - 3, y - height, 6, 2 * height)]
    for point, (x, y) in zip(points, centres, strict=True):
        if not point.label:
            continue
        text = axes.annotate(
            point.label,
            (point.numbers, point.score),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=14,
            color=COLOURS[point.whose],
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": _GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 4},
        )
        size = text.get_window_extent()
        for dx, dy in _around(size.width, size.height):
            box = Bbox.from_bounds(x + dx - size.width / 2, y + dy - size.height / 2, size.width, size.height)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0
            if inside and box.y1 < axes.bbox.y1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box.padded(8, 2))
        text.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))


def _around(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield shifts of a label's centre, in pixels, the nearest first."""
    for ring in range(30):
        for turn in (0.0, 1.0, 0.5, -0.5, 0.25, -0.25, 0.75, -0.75):  # in half turns
            reach = 12 + 8 * ring
            across, up = math.cos(turn * math.pi), math.sin(turn * math.pi)
            yield across * (width / 2 + reach), up * (height / 2 + reach)


def bars(
    names: Sequence[str], sizes: Sequence[int], values: Sequence[float], errors: Sequence[float], path: Path
) -> None:
    """Draw a line a method, the smallest at the bottom: its accuracy with an error bar, its size beside its name."""
    order = sorted((at for at in range(len(names)) if sizes[at]), key=lambda at: sizes[at])
    figure = Figure(figsize=(7.2, 0.24 * len(order) + 1.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for height, at in enumerate(order):
        colour = COLOURS["PEFT" if names[at].startswith("peft") else "this library"]
        axes.errorbar(values[at], height, xerr=errors[at], fmt="o", color=colour, capsize=2)
    for at in range(len(names)):
        if not sizes[at]:
            axes.axvline(values[at], color=_GREY, linestyle="--")
            axes.text(values[at], len(order) - 0.3, f" {names[at]}", color=_GREY)
    axes.set_yticks(range(len(order)), [f"{names[at]}   {sizes[at]:,}" for at in order])
    axes.set_xlabel("accuracy, one standard error")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata=_PLAIN)
