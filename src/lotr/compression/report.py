"""What a fit cost: errors by task and module, bytes before and after, and what to do about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..adapters import plots
from ..sharing.plan import Plan
from .base import is_same_base
from .fit import GroupFit, error_of_all
from .ranks import Curve, bytes_of, chosen_ranks, error_of, one_rank_for_all
from .stack import Stack
from .tasks import Lost

REPORT, PICTURE = "compress.json", "compress.png"


@dataclass(frozen=True)
class Report:
    """What became of many adapters."""

    bank: str  # its folder
    base_model: str | None
    trained_on: str | None  # the base model that the adapters tell
    tasks: int  # how many there are
    error: float  # root of the mean squared relative error of a task, `‖Δ − U C Vᵀ‖ / ‖Δ‖`
    median_error: float
    bytes_before: int  # of all adapters' weights
    bytes_after: int  # of all files of the bank
    bytes_of_heads: int
    bytes_of_numbers: int  # of factors, cores and heads
    groups: list[dict[str, Any]]  # with their errors at the start and after every sweep
    by_task: list[dict[str, Any]]  # the worst first; where it was measured, with its score before and after
    by_module: dict[str, float]  # relative error, all adapters together
    curve: list[dict[str, float]]  # of the HOSVD with one rank for all groups, at most 48 points
    advice: list[str]  # what to do about the error and the bytes, in sentences
    seconds: float


def report_of(
    stack: Stack,
    plan: Plan,
    curves: dict[str, Curve],
    others: Mapping[str, dict[str, Curve]],
    fits: Mapping[str, GroupFit],
    lost: Lost,
    asked: float | None,
    scores: Mapping[str, Mapping[str, Any]],
    **told: Any,
) -> Report:
    """Return the report of a fit, to whose `max_error` `asked` belongs; `told` are the other fields.

    `curves` tell what rank buys, by group; `others` with other cores, by what `--core` calls them.
    """
    by_task: list[dict[str, Any]] = [
        {
            "task": entry.name,
            "error": (error := entry.error(lost[entry.name])),
            "kept": 1 - error**2,
            "rank_before": entry.rank,
            "bytes_before": entry.bytes,
            "missing": len(plan.targets) - len(entry.energies),
            **scores.get(entry.name, {}),
        }
        for entry in stack.entries
    ]
    errors = [row["error"] for row in by_task]
    overall = (sum(error * error for error in errors) / len(errors)) ** 0.5
    ranks = {group.name: group.core.r for group in plan.groups}
    heads = sum(entry.head_bytes for entry in stack.entries)
    before = sum(entry.bytes for entry in stack.entries)
    after = heads + bytes_of(curves, ranks)
    by_task.sort(key=lambda row: -row["error"])
    return Report(
        tasks=len(stack),
        error=overall,
        median_error=median(errors),
        bytes_before=before,
        bytes_of_heads=heads,
        bytes_of_numbers=after,
        groups=[
            {
                "group": group.name,
                "sites": len(group.sites),
                "block": list(group.shape),
                "rank": group.core.r,
                "errors": fits[group.name].errors,
            }
            for group in plan.groups
        ],
        by_task=by_task,
        by_module=_by_module(stack, plan, lost),
        curve=one_rank_for_all(curves, heads),
        advice=[
            *_about_error(curves, ranks, overall, error_of_all(fits), asked),
            *_about_cores(others, bytes_of(curves, ranks), overall),
            *_about_tasks(by_task, stack),
            *_about_scores(by_task),
            *_about_base(told["base_model"], told["trained_on"]),
            *_about_bytes(before, after, told["bytes_after"]),
        ],
        **told,
    )


def _by_module(stack: Stack, plan: Plan, lost: Lost) -> dict[str, float]:
    energy, left = dict.fromkeys(plan.shape_of, 0.0), dict.fromkeys(plan.shape_of, 0.0)
    for entry in stack.entries:
        for module, of_module in lost[entry.name].items():
            left[module] += of_module
            energy[module] += entry.energies.get(module, 0.0)
    return {module: (left[module] / energy[module]) ** 0.5 if energy[module] else 0.0 for module in energy}


def _about_error(
    curves: dict[str, Curve], ranks: dict[str, int], error: float, fitted: float, asked: float | None
) -> list[str]:
    """Say what a smaller error takes: another rank, or another type where rounding is much of it."""
    missed = asked is not None and error > asked
    notes = [f"The error that was asked for, {asked:.2g}, is not reached."] if missed else []
    if (error > 1e-3 and fitted < error / 2) or (missed and fitted <= float(asked or 0)):
        return [*notes, "Much of this error is rounding. Keep the numbers with --dtype float32."]
    if error <= 1e-3:
        return notes
    better = chosen_ranks(curves, max_error=error / 2)
    if error_of(curves, better) > error / 2:
        return notes
    factor = bytes_of(curves, better) / bytes_of(curves, ranks)
    return [
        *notes,
        f"Half of this error takes {factor:.1f} times the bytes: --max-error {error / 2:.2g} (ranks "
        f"{min(better.values())} to {max(better.values())}).",
    ]


def _about_cores(others: Mapping[str, dict[str, Curve]], size: int, error: float) -> list[str]:
    """Say which other cores are sure to lose less in as many bytes."""
    losses = {
        core: error_of(curves, chosen_ranks(curves, max_bytes=size))
        for core, curves in others.items()
        if bytes_of(curves, dict.fromkeys(curves, 1)) <= size
    }
    return [
        f"In as many bytes --core {core} loses at most {most:.2g}."
        for core, most in losses.items()
        if most < 0.95 * error
    ]


def _about_tasks(by_task: list[dict[str, Any]], stack: Stack) -> list[str]:
    """Say which adapter loses most, and which change nothing, at all or at some modules."""
    notes, worst = [], by_task[0]
    if worst["error"] > 2 * median(row["error"] for row in by_task) and worst["error"] > 1e-3:
        notes.append(
            f"{worst['task']} loses {worst['error']:.2g}, more than twice the median: it shares least with the others. "
            "Raise its weight, or keep it as the LoRA that it is."
        )
    if some := sorted(row["task"] for row in by_task if row["missing"]):
        notes.append(
            f"{len(some)} adapters lack modules that others adapt, first {some[0]}; they are zero there."
        )
    if nothing := [entry.name for entry in stack.entries if not entry.energy]:
        notes.append(
            f"{len(nothing)} adapters are zero everywhere, first {nothing[0]}: they were never trained."
        )
    return notes


def _about_scores(by_task: list[dict[str, Any]]) -> list[str]:
    """Say what the adapters score on average, and which loses most."""
    notes = []
    for metric in dict.fromkeys(row["metric"] for row in by_task if "metric" in row):
        rows = [row for row in by_task if row.get("metric") == metric]
        before, after = (mean(row[f"score_{when}"] for row in rows) for when in ("before", "after"))
        sign = -1 if metric == "loss" else 1
        worst = min(rows, key=lambda row: sign * (row["score_after"] - row["score_before"]))
        notes.append(
            f"Mean {metric} of {len(rows)} tasks: {before:.4g} before, {after:.4g} after; {worst['task']} loses most, "
            f"{worst['score_before']:.4g} to {worst['score_after']:.4g}."
        )
    return notes


def _about_base(base: str | None, trained_on: str | None) -> list[str]:
    """Say that a base model of another name was given: where it lies may differ, its weights may not."""
    if base is None or trained_on is None or is_same_base(base, trained_on):
        return []
    return [f"The adapters tell {trained_on!r}, and the bank is for {base!r}: both must be the same weights."]


def _about_bytes(before: int, numbers: int, after: int) -> list[str]:
    """Say why a bank is no smaller than the adapters were."""
    if after < before:
        return []
    why = (
        "its numbers are: choose a smaller --rank, or --max-bytes"
        if numbers >= before
        else f"its numbers take {numbers:,} bytes, the rest is the empty store. It pays with more or larger adapters"
    )
    return [f"The bank is no smaller than the adapters: {why}."]


def draw(report: Report, path: Path) -> None:
    """Draw error against bytes, with the point that was chosen."""
    figure = plots.figure_of(6.4, 3.8)
    axis = figure.subplots()
    sizes, errors = ([point[name] for point in report.curve] for name in ("bytes", "error"))
    axis.plot(sizes, errors, color=plots.BLUE, label="one rank for all")
    axis.plot([report.bytes_of_numbers], [report.error], "o", color=plots.ORANGE, label="this bank")
    axis.axvline(report.bytes_before, color="#8a8f98", linestyle=":", label="the adapters")
    axis.set(xscale="log", ylim=(0, 1), xlabel="bytes of factors, cores and heads", ylabel="relative error")
    axis.legend(frameon=False)
    plots.save(figure, path)
