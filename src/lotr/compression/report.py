"""What a fit cost: errors by task and module, bytes before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..files.atomic import write_json
from ..sharing.plan import Plan
from .fit import GroupFit
from .ranks import Curve, bytes_of, chosen_ranks, error_of
from .stack import Entry, Stack

REPORT, PICTURE = "compress.json", "compress.png"


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
    """

    stack: Stack
    plan: Plan
    curves: dict[str, Curve]
    fits: dict[str, GroupFit]
    dtype: str
    lost: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, entry: Entry, lost: dict[str, float]) -> float:
        """Note what one adapter lost, and return its relative error."""
        self.lost[entry.name] = lost
        return self.error(entry)

    def error(self, entry: Entry) -> float:
        """Return the relative error of an adapter."""
        return (sum(self.lost[entry.name].values()) / entry.energy) ** 0.5 if entry.energy else 0.0

    def by_module(self) -> dict[str, float]:
        """Return the relative error of every module, all adapters together."""
        entries = self.stack.entries
        energy, lost = dict.fromkeys(self.plan.shape_of, 0.0), dict.fromkeys(self.plan.shape_of, 0.0)
        for entry in entries:
            for module, of_module in self.lost[entry.name].items():
                lost[module] += of_module
                energy[module] += entry.energies.get(module, 0.0)
        return {
            module: (lost[module] / energy[module]) ** 0.5 if energy[module] else 0.0 for module in energy
        }

    def curve(self) -> list[dict[str, float]]:
        """Return rank, bytes and error of the HOSVD with one rank for all groups, at most 48 points."""
        most = max(curve.most for curve in self.curves.values())
        every = sorted({round(most ** (n / 47)) for n in range(48)})
        head = sum(entry.head_bytes for entry in self.stack.entries)
        points = []
        for rank in every:
            ranks = {name: min(rank, curve.most) for name, curve in self.curves.items()}
            size = head + bytes_of(self.curves, ranks)
            points.append({"rank": rank, "bytes": size, "error": error_of(self.curves, ranks)})
        return points


def write_report(
    outcome: Outcome, output: Path, folder: Path, trained_on: str | None, seconds: float
) -> dict[str, Any]:
    """Return the report of a fit, and write it and its picture into the folder of the bank."""
    entries = outcome.stack.entries
    errors = {entry.name: outcome.error(entry) for entry in entries}
    missing = {entry.name: len(outcome.plan.targets) - len(entry.energies) for entry in entries}
    mean = (sum(error * error for error in errors.values()) / len(errors)) ** 0.5
    report: dict[str, Any] = {
        "bank": str(output),
        "trained_on": trained_on,
        "tasks": len(entries),
        "error": mean,
        "median_error": median(errors.values()),
        "bytes_before": sum(entry.bytes for entry in entries),
        "bytes_after": sum(file.stat().st_size for file in folder.iterdir()),
        "bytes_of_heads": sum(entry.head_bytes for entry in entries),
        "bytes_of_numbers": bytes_of(
            outcome.curves, {group.name: group.core.r for group in outcome.plan.groups}
        )
        + sum(entry.head_bytes for entry in entries),
        "groups": [
            {
                "group": group.name,
                "sites": len(group.sites),
                "block": list(group.shape),
                "rank": group.core.r,
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
                "missing": missing[entry.name],
            }
            for entry in sorted(entries, key=lambda entry: -errors[entry.name])
        ],
        "by_module": outcome.by_module(),
        "curve": outcome.curve(),
        "advice": [*_advice(outcome, errors, mean), *_zeros(entries, missing)],
        "seconds": round(seconds, 3),
    }
    write_json(folder / REPORT, report)
    draw(report, folder / PICTURE)
    return report


def _advice(outcome: Outcome, errors: dict[str, float], mean: float) -> list[str]:
    """Return what to do about the error, in sentences."""
    advice = []
    ranks = {group.name: group.core.r for group in outcome.plan.groups}
    better = chosen_ranks(outcome.curves, max_error=mean / 2)
    if mean > 1e-3 and error_of(outcome.curves, better) <= mean / 2:
        factor = bytes_of(outcome.curves, better) / bytes_of(outcome.curves, ranks)
        advice.append(
            f"Half of this error takes {factor:.1f} times the bytes: --max-error {mean / 2:.2g} (ranks "
            f"{min(better.values())} to {max(better.values())})."
        )
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > 2 * median(errors.values()) and errors[worst] > 1e-3:
        advice.append(
            f"{worst} loses {errors[worst]:.2g}, more than twice the median: it shares least with the others. Raise "
            "its weight, or keep it as the LoRA that it is."
        )
    return advice


def _zeros(entries: Sequence[Entry], missing: dict[str, int]) -> list[str]:
    """Say which adapters change nothing, at all or at some modules."""
    notes = []
    if some := [entry.name for entry in entries if missing[entry.name]]:
        notes.append(
            f"{len(some)} adapters lack modules that others adapt, first {some[0]}; they are zero there."
        )
    if nothing := [entry.name for entry in entries if not entry.energy]:
        notes.append(
            f"{len(nothing)} adapters are zero everywhere, first {nothing[0]}: they were never trained."
        )
    return notes


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw error against bytes, with the point that was chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axis = figure.subplots()
    points = report["curve"]
    axis.plot(
        [p["bytes"] for p in points], [p["error"] for p in points], color="#3b6fb6", label="one rank for all"
    )
    size = report["bytes_of_numbers"]
    axis.plot([size], [report["error"]], "o", color="#d9822b", label="this bank")
    axis.axvline(report["bytes_before"], color="#8a8f98", linestyle=":", label="the adapters")
    axis.set_xscale("log")
    axis.set_ylim(0, 1)
    axis.set_xlabel("bytes of factors, cores and heads")
    axis.set_ylabel("relative error")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
