"""Tables and picture of docs/results_encoder.md: all that stands between its marks comes from the data files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import quality_defaults
import quality_fit
from quality_runs import Estimate, Results
from records import fill, markdown

MODULES = {"qv": "query and value", "all": "all linear modules"}
LABELS = {  # of the methods that the picture shows
    "lotr_joint gaussian r": "LoTR, authors' start",
    "lotr_joint gradient r": "LoTR",
    "lotr_joint norms gradient r": "LoTR with norms",
    "lotr_joint 3 x gradient r": "LoTR, three pairs",
    "lotr cores gradient r": "LoTR, cores",
    "lora_xs gradient r": "LoRA-XS",
    "peft_lora r": "LoRA",
    "peft_dora r": "DoRA",
    "peft_tinylora u": "TinyLoRA",
    "peft_vera r": "VeRA",
    "peft_fourierft ": "FourierFT",
    "peft_waveft ": "WaveFT",
    "peft_unilora ": "Uni-LoRA",
    "peft_c3a": "C3A",
    "peft_ia3": "IA³",
    "metatt_4d r": "MetaTT",
    "lorta r": "LoRTA",
}
#: Printed by the authors of LoTR (arXiv 2402.01376, table 3): RoBERTa-base, one pair of factors for query and value.
PUBLISHED = {
    "CoLA": (0.526, 0.547),
    "MRPC": (0.879, 0.853),
    "QNLI": (0.900, 0.912),
    "RTE": (0.668, 0.686),
    "SST-2": (0.933, 0.938),
    "STS-B": (0.886, 0.896),
}


def comparisons(results: Results) -> list[str]:
    """Return the tables of wins and losses."""
    lines: list[str] = []
    for modules, title in MODULES.items():
        rows = []
        for where, name, peer in results.grid["comparisons"]:
            if where == modules:
                above, _ = results.above(modules, name, peer)
                sizes = [f"{some}: {results.numbers[modules, some]:,}" for some in (name, peer)]
                points = f"{100 * above.mean:+.1f} ± {100 * above.error:.1f}"
                rows.append([*sizes, points, verdict(above)])
        if rows:
            lines += ["", *markdown((f"ours, on {title}", "against", "points", ""), rows, left=2)]
    return lines[1:]


def verdict(above: Estimate) -> str:
    """Return which side of the 95 % interval a difference is on."""
    if above.mean > above.interval:
        return "**above**"
    return "*below*" if above.mean < -above.interval else "level"


def all_scores(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of all methods, the smallest first."""
    tasks = list(results.grid["tasks"])
    order = sorted(results.numbers, key=lambda cell: (cell[0] != "qv", results.numbers[cell], cell[1]))
    rows = []
    for modules, name in order:
        some = [results.score(modules, name, [task]) for task in tasks]
        mean = results.score(modules, name, results.grid["mean"])
        rows.append([modules, name, f"{results.numbers[modules, name]:,}", *map(_score, [*some, mean])])
    return ["modules", "method", "numbers", *tasks, "mean"], rows


def _score(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    error = "" if math.isnan(estimate.error) else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.mean:.1f}{error}"


def draw(results: Results, path: Path) -> None:
    """Draw the mean score of every method of `LABELS` against its trained numbers, a panel for each set of modules."""
    panels = {}
    for modules, title in MODULES.items():
        points = []
        for where, name in results.numbers:
            score = results.score(where, name, results.grid["mean"])
            label = next((LABELS[start] for start in LABELS if _is(name, start)), None)
            if where == modules and score is not None and (label or name == "head alone"):
                whose = "PEFT" if name.startswith("peft_") else "this library"
                numbers = results.numbers[where, name]
                mean, error = 100 * score.mean, 100 * score.error
                points.append(pictures.Point(label or name, label or name, numbers, mean, error, whose))
        if points:
            panels[title[0].upper() + title[1:]] = _once(points)
    axis = f"accuracy, mean of {' and '.join(results.grid['mean'])}, %"
    pictures.scores(panels, axis, path)


def _is(name: str, start: str) -> bool:
    """Whether a name is the start and a size."""
    return name == start or (name.startswith(start) and name.removeprefix(start).replace("x", "").isdigit())


def _once(points: Sequence[pictures.Point]) -> list[pictures.Point]:
    """Return points of which only the largest of equal labels keeps it, so that names do not crowd."""
    largest = {
        label: max(p.numbers for p in points if p.label == label) for label in {p.label for p in points}
    }
    return [p if p.numbers == largest[p.label] else replace(p, label="") for p in points]


def published() -> list[str]:
    """Return the table that the authors of LoTR printed."""
    rows = [
        [name, "75,264", *(f"{scores[at]:.3f}" for scores in PUBLISHED.values())]
        for at, name in enumerate(("LoTR, rank 32", "LoRA, rank 2"))
    ]
    return markdown(("RoBERTa-base", "numbers", *PUBLISHED), rows)


def limits(data: Path) -> list[str]:
    """Return the table of what the structures can hold of a fully trained update."""
    rows = _rows(data / "quality_fit.json")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines: list[str] = []
    for modules in dict.fromkeys(row["target"] for row in rows):
        some = [row for row in rows if row["target"] == modules]
        header = (f"{MODULES[modules]}: fit", "numbers", "of the energy", *tasks)
        lines += ["", *markdown(header, quality_fit.summary(some))]
    return lines[1:]


def defaults(data: Path) -> list[str]:
    """Return the table of `lotr train` without options."""
    return markdown(quality_defaults.HEADER, quality_defaults.summary(_rows(data / "defaults.json")))


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def sections(results: Results, data: Path) -> dict[str, list[str]]:
    """Return what stands between the marks of the page, by name."""
    seeds = statistics.median(len(s) for tasks in results.scores.values() for s in tasks.values())
    count = (
        f"{results.n_runs:,} runs, {len(results.numbers)} methods and sizes; in the median {seeds:.0f} seeds."
    )
    return {
        "comparisons": comparisons(results),
        "published": published(),
        "defaults": defaults(data),
        "limits": limits(data),
        "runs": [count],
    }


def renew(results: Results, page: Path) -> None:
    """Write the tables into the page, and its picture beside it."""
    for name, lines in sections(results, page.parent / "data").items():
        fill(page, name, lines)
    draw(results, page.parent / "images" / "results.png")
