"""Pictures of what the commands report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .inspection import Inspection, SiteReport

BLUE, ORANGE = "#3b6fb6", "#d9822b"


def figure_of(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def check_picture(path: Path) -> None:
    """Refuse a place where no picture can be drawn (ConfigError), before any work is done."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: the folder {path.parent} does not exist.")
    if path.suffix[1:].lower() not in kinds:
        raise ConfigError(f"--picture {path} has no known type. Name a .png, .pdf or .svg file.")


def save(figure: Any, path: Path) -> None:
    # without a date or a version in it, equal content gives equal bytes
    figure.savefig(path, metadata={"Software": None})


def curve(history: Sequence[dict[str, Any]], metric: str, title: str, path: Path) -> None:
    """Draw the training loss and the evaluation metric of entries with `step`, `loss`, `eval_<metric>`."""
    figure = figure_of(7, 3.6)
    axis = figure.subplots()
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(entry["step"], entry[f"eval_{metric}"]) for entry in history if f"eval_{metric}" in entry]
    axis.plot(*zip(*losses, strict=True) if losses else ((), ()), color=BLUE, label="training loss")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss", color=BLUE)
    if scores:
        other = axis.twinx()
        other.plot(*zip(*scores, strict=True), color=ORANGE, marker="o", label=metric)
        other.set_ylabel(f"evaluation {metric}", color=ORANGE)
        other.spines["top"].set_visible(False)
    axis.set_title(title, parse_math=False)  # which has the name of a file
    axis.spines["top"].set_visible(False)
    save(figure, path)


def confusion(counts: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix `(classes, classes)`, whose rows are true classes and columns predicted ones."""
    n = len(labels)
    size = max(4.0, 0.42 * n + 2.2)
    figure = figure_of(size, size)
    axis = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(n), labels, rotation=60, ha="right", parse_math=False)
    axis.set_yticks(range(n), labels, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if n <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", size=7, color=colour)
    save(figure, path)


def draw(inspection: Inspection, path: Path) -> None:
    """Draw the norms of the updates, one number a layer and projection."""
    layers, projections, norms = norms_by_place(inspection.sites)
    figure = figure_of(max(4.0, 0.8 * len(projections) + 2.6), max(2.4, 0.28 * len(layers) + 1.8))
    axis = figure.subplots()
    image = axis.imshow(norms, cmap="viridis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(projections)), projections, rotation=30, ha="right")
    axis.set_yticks(range(len(layers)), layers)
    axis.set_ylabel("layer")
    axis.set_title("norm of the update, ‖ΔW‖")
    figure.colorbar(image, ax=axis)
    save(figure, path)


def norms_by_place(sites: Sequence[SiteReport]) -> tuple[list[str], list[str], np.ndarray]:
    """Return layers, projections, and the norm of the updates in each, NaN where there is no site.

    Heads of one layer and projection are blocks of one matrix: their norms are joined.
    """
    layers = sorted({site.layer for site in sites}, key=_natural)
    projections = list(dict.fromkeys(site.projection for site in sites))
    squares = np.full((len(layers), len(projections)), np.nan)
    for site in sites:
        at = layers.index(site.layer), projections.index(site.projection)
        squares[at] = np.nan_to_num(squares[at]) + site.norm**2
    return layers, projections, np.sqrt(squares)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]
