"""Pictures of what the commands report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .inspection import Inspection

_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#8a8f98"
# without a date or a version in it, equal content gives equal bytes
_PLAIN = {"Software": None}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata=_PLAIN)


def curve(history: Sequence[dict[str, Any]], metric: str, title: str, path: Path) -> None:
    """Draw the training loss and the evaluation metric over the steps.

    Args:
        history: Entries with `step` and some of `loss`, `eval_<metric>`.
        metric: Name of the metric.
        title: Title of the picture.
        path: PNG file.
    """
    figure = _figure(7, 3.6)
    axis = figure.subplots()
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(entry["step"], entry[f"eval_{metric}"]) for entry in history if f"eval_{metric}" in entry]
    axis.plot(*zip(*losses, strict=True) if losses else ((), ()), color=_BLUE, label="training loss")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss", color=_BLUE)
    if scores:
        other = axis.twinx()
        other.plot(*zip(*scores, strict=True), color=_ORANGE, marker="o", label=metric)
        other.set_ylabel(f"evaluation {metric}", color=_ORANGE)
        other.spines["top"].set_visible(False)
    axis.set_title(title)
    axis.spines["top"].set_visible(False)
    _save(figure, path)


def confusion(counts: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix.

    Args:
        counts: Rows are true classes, columns predicted ones; shape `(classes, classes)`.
        labels: Names of the classes.
        path: PNG file.
    """
    n = len(labels)
    size = max(4.0, 0.42 * n + 2.2)
    figure = _figure(size, size)
    axis = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(n), labels, rotation=60, ha="right")
    axis.set_yticks(range(n), labels)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if n <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", size=7, color=colour)
    _save(figure, path)


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: Path) -> None:
    """Draw one number a layer and projection; places without a site stay white.

    Args:
        values: Shape `(rows, columns)`, NaN where there is nothing.
        rows: Names of the layers.
        columns: Names of the projections.
        title: What the numbers are.
        path: PNG file.
    """
    figure = _figure(max(4.0, 0.8 * len(columns) + 2.6), max(2.4, 0.28 * len(rows) + 1.8))
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylabel("layer")
    axis.set_title(title)
    figure.colorbar(image, ax=axis)
    _save(figure, path)


def by_place(
    places: Sequence[tuple[str, str]],
    values: Sequence[float],
    title: str,
    path: Path,
    together: Any = np.mean,
) -> None:
    """Draw a heat map of one number a site.

    Args:
        places: Layer and projection of each site.
        values: One number a site.
        title: What the numbers are.
        path: PNG file.
        together: Joins the numbers of sites of one place, as heads are.
    """
    layers = sorted({layer for layer, _ in places}, key=_natural)
    projections = list(dict.fromkeys(projection for _, projection in places))
    grid = np.full((len(layers), len(projections)), np.nan)
    for layer, projection in set(places):
        here = [value for place, value in zip(places, values, strict=True) if place == (layer, projection)]
        grid[layers.index(layer), projections.index(projection)] = together(here)
    heat_map(grid, layers, projections, title, path)


def draw(inspection: Inspection, path: Path) -> None:
    """Draw the norms of the updates by layer and projection.

    Args:
        inspection: See `lotr.inspect`.
        path: PNG file.
    """
    places = [(site.layer, site.projection) for site in inspection.sites]
    norms = [site.norm for site in inspection.sites]
    by_place(places, norms, "norm of the update, ‖ΔW‖", path, together=np.linalg.norm)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


def score_by_name(
    names: Sequence[str], sizes: Sequence[int], scores: Sequence[float], error: float, axis: str, path: Path
) -> None:
    """Draw one line a method, the smallest at the bottom: its score with an error bar, its size beside its name.

    Args:
        names: Methods.
        sizes: Trained numbers; a method without any is drawn as a line through all.
        scores: Scores.
        error: Standard error of a score.
        axis: Label of the score.
        path: PNG file.
    """
    order = sorted((at for at in range(len(names)) if sizes[at]), key=lambda at: sizes[at])
    figure = _figure(7.2, 0.24 * len(order) + 1.2)
    plot = figure.subplots()
    for height, at in enumerate(order):
        colour = _BLUE if names[at].startswith("lotr") else _ORANGE if names[at].startswith("peft") else _GREY
        plot.errorbar(scores[at], height, xerr=error, fmt="o", color=colour, capsize=2)
    for at in range(len(names)):
        if not sizes[at]:
            plot.axvline(scores[at], color=_GREY, linestyle="--")
            plot.text(scores[at], len(order) - 0.3, f" {names[at]}", color=_GREY)
    plot.set_yticks(range(len(order)), [f"{names[at]}   {sizes[at]:,}" for at in order])
    plot.set_xlabel(axis)
    plot.grid(axis="x", alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
