"""One picture a benchmark: a panel a model, a line a method over ranks, and over tokens where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
Point = tuple[float, float, float, float]  # x, median, low, high

COLOURS = {
    "peft_lora": "#d9822b",
    "peft_dora": "#b5591b",
    "peft_vera": "#e6b566",
    "full": "#8a8f98",
    "lotr": "#3b6fb6",
    "lotr_cores": "#2a9d8f",
    "lotr_per_output": "#7b5ea7",
    "lotr_per_output_cores": "#b089d6",
    "lotr_per_output_and_input": "#c05f8e",
    "lotr_base_and_update": "#5f8ec0",
}


def panels(rows: Sequence[Row], value: str, axis: str, path: Path, level: float | None = 1.0) -> None:
    """Draw a value of the rows.

    Args:
        rows: With `shape`, `batch`, `length`, `method`, `rank` and the value: a median with quartiles, or a number.
        value: Name of the value.
        axis: What it is.
        path: PNG file.
        level: Where a dashed line stands for "no difference".
    """
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    sweeps = [shape for shape in shapes if len(_sizes(rows, shape)) > 1]
    figure = Figure(figsize=(3.6 * len(shapes) + 2, 6.4 if sweeps else 3.6), dpi=120, layout="constrained")
    grid = figure.subplots(2 if sweeps else 1, len(shapes), squeeze=False)
    for column, shape in enumerate(shapes):
        mine = [row for row in rows if row["shape"] == shape and row.get(value) and row["method"] in COLOURS]
        first = _sizes(rows, shape)[0]
        at_first = [row for row in mine if (row["batch"], row["length"]) == first and row["rank"]]
        _draw(grid[0][column], at_first, lambda row: row["rank"], value, level)
        grid[0][column].set_title(f"{shape}, {first[0]} × {first[1]} tokens", fontsize=10)
        grid[0][column].set_xlabel("rank")
        if sweeps:
            others = [row for row in mine if (row["batch"], row["length"]) != first and row["rank"]]
            alike = {(row["method"], row["rank"], row["length"]) for row in others}
            swept = [row for row in mine if (row["method"], row["rank"], row["length"]) in alike]
            _draw(grid[1][column], swept, lambda row: row["batch"] * row["length"], value, level)
            grid[1][column].set_xlabel(f"tokens, rank {swept[0]['rank']}" if swept else "tokens")
    for line in grid:
        line[0].set_ylabel(axis)
    labels = {
        name: handle
        for line in grid
        for ax in line
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _sizes(rows: Sequence[Row], shape: str) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["batch"], row["length"]) for row in rows if row["shape"] == shape))


def _draw(axes: Axes, rows: Sequence[Row], x: Any, value: str, level: float | None) -> None:
    if level is not None:
        axes.axhline(level, color="#8a8f98", linestyle="--", linewidth=1)
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted(_point(x(row), row[value]) for row in rows if row["method"] == method)
        at, median, low, high = zip(*points, strict=True)
        errors = [
            [m - v for m, v in zip(median, low, strict=True)],
            [v - m for m, v in zip(median, high, strict=True)],
        ]
        axes.errorbar(
            at, median, yerr=errors, fmt="o-", color=COLOURS[method], label=method, capsize=2, markersize=4
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({x(row) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _point(x: float, value: Any) -> Point:
    spread = value if isinstance(value, dict) else dict.fromkeys(("median", "low", "high"), value)
    return x, spread["median"], spread["low"], spread["high"]


def bars(rows: Sequence[Row], axis: str, path: Path) -> None:
    """Draw the ratio to LoRA of every method for each action, as points with quartiles."""
    actions = list(dict.fromkeys(row["action"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(7, 0.8 * len(actions) + 1.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="#8a8f98", linestyle="--", linewidth=1)
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        heights = [actions.index(row["action"]) + 0.13 * (number - len(methods) / 2) for row in mine]
        spreads = [row["of_lora"] for row in mine]
        middle = [spread["median"] for spread in spreads]
        errors = [[abs(spread[side] - spread["median"]) for spread in spreads] for side in ("low", "high")]
        axes.errorbar(middle, heights, xerr=errors, fmt="o", color=COLOURS[method], label=method, capsize=2)
    axes.set_yticks(range(len(actions)), actions)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
