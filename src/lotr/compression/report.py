"""What a fit cost: errors by task and module, bytes before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..files.atomic import write_json
from ..sharing.plan import Plan
from .fit import GroupFit
from .ranks import Curve
from .stack import Entry, Stack

REPORT = "compress.json"


@dataclass
class Outcome:
    """Errors as they become known.

    Args:
        stack: The adapters.
        plan: The plan of the bank.
        curves: What rank buys, by group.
        fits: The fit of every group.
        dtype: Type in which the bank keeps cores.
        lost: By task: `‖Δ − U C Vᵀ‖²` of every module.
        rounded: By task: what rounding the cores cost, squared.
    """

    stack: Stack
    plan: Plan
    curves: dict[str, Curve]
    fits: dict[str, GroupFit]
    dtype: str
    lost: dict[str, dict[str, float]] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)

    def add(self, entry: Entry, lost: dict[str, float], rounded: float) -> None:
        """Note what one adapter lost."""
        self.lost[entry.name], self.rounded[entry.name] = lost, rounded
        self.energies[entry.name] = entry.energy

    def error(self, name: str) -> float:
        """Return the relative error of a task, rounding included."""
        energy = self.energies[name]
        return ((sum(self.lost[name].values()) + self.rounded[name]) / energy) ** 0.5 if energy else 0.0


def report_of(outcome: Outcome, output: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Return the report of a fit, and write it into the folder of the bank."""
    entries = outcome.stack.entries
    errors = {entry.name: outcome.error(entry.name) for entry in entries}
    squares = [error * error for error in errors.values()]
    report = {
        "bank": str(output),
        "tasks": len(entries),
        "error": (sum(squares) / len(squares)) ** 0.5,
        "median_error": median(errors.values()),
        "worst": sorted(errors, key=lambda name: -errors[name])[:5],
        "bytes_before": sum(entry.bytes for entry in entries),
        "bytes_after": sum(file.stat().st_size for file in folder.iterdir()),
        "groups": [
            {
                "group": group.name,
                "sites": len(group.sites),
                "block": list(group.shape),
                "rank": max(group.rank),
                "error": outcome.fits[group.name].errors[-1],
                "errors": outcome.fits[group.name].errors,
            }
            for group in outcome.plan.groups
        ],
        "by_task": [
            {
                "task": entry.name,
                "error": errors[entry.name],
                "kept": 1 - errors[entry.name] ** 2,
                "rank_before": entry.rank,
                "bytes_before": entry.bytes,
                "missing": len(outcome.plan.targets) - len(entry.energies),
            }
            for entry in entries
        ],
        "seconds": round(seconds, 3),
    }
    write_json(folder / REPORT, report)
    return report
