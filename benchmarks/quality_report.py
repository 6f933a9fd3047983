"""Tables and the picture of `quality.py`, from its lines alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Run = dict[str, Any]


def read(folder: Path) -> list[Run]:
    """Return all runs of a folder."""
    return [
        json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]


def tuned(runs: list[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Return for each (target, method, task) the runs with the rates whose mean dev score is the highest."""
    cells: dict[tuple[str, str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[run["target"], run["method"], run["task"]][json.dumps(run["rates"])].append(run)
    return {
        cell: max(by_rates.values(), key=lambda some: statistics.mean(run["dev"] for run in some))
        for cell, by_rates in cells.items()
    }


def summary(runs: list[Run]) -> list[Run]:
    """Return one entry a target and method: numbers, test score of each task, and over all tasks with its error."""
    best = tuned(runs)
    entries = []
    for target, method in dict.fromkeys((target, method) for target, method, _ in best):
        tasks = {task: some for (t, m, task), some in best.items() if (t, m) == (target, method)}
        # the error of a mean over tasks: of each task's mean over seeds, added in quadrature
        means = {task: statistics.mean(run["test"] for run in some) for task, some in tasks.items()}
        errors = [_error([run["test"] for run in some]) for some in tasks.values()]
        entries.append(
            {
                "target": target,
                "method": method,
                "numbers": next(iter(tasks.values()))[0]["numbers"],
                "seeds": min(len(some) for some in tasks.values()),
                "tasks": means,
                "test": statistics.mean(means.values()),
                "error": sum(error**2 for error in errors) ** 0.5 / len(errors),
            }
        )
    return sorted(entries, key=lambda entry: (entry["target"], entry["numbers"]))


def _error(scores: list[float]) -> float:
    return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")


def show(runs: list[Run]) -> None:
    """Print the table."""
    entries = summary(runs)
    tasks = list(dict.fromkeys(task for entry in entries for task in entry["tasks"]))
    table = Table(title=f"Test accuracy, rates chosen on dev; {len(runs)} runs", title_justify="left")
    for name in ("target", "method", "numbers", "seeds", *tasks, "mean", "± error"):
        table.add_column(name, justify="left" if name in ("target", "method") else "right")
    for entry in entries:
        scores = [f"{entry['tasks'][task]:.4f}" if task in entry["tasks"] else "" for task in tasks]
        row = (entry["target"], entry["method"], f"{entry['numbers']:,}", str(entry["seeds"]), *scores)
        table.add_row(*row, f"{entry['test']:.4f}", f"{entry['error']:.4f}")
    Console(width=140).print(table)
