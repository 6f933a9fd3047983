"""What a fit cost: errors by task and module, bytes before and after, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..adapters import plots
from ..sharing.plan import Plan
from .base import is_same_base
from .fit import error_of_all
from .ranks import Curve, Ranks, bytes_of, chosen_ranks, error_of, key_of, one_rank_for_all
from .stack import Stack
from .tasks import Fitted, Lost

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
    fitted: Sequence[Fitted],
    by_core: Mapping[str, dict[str, Curve]],
    core: str,
    lost: Mapping[str, Lost],
    asked: float | None,
    dtype: str,
    scores: Mapping[str, Mapping[str, Any]],
    **told: Any,
) -> Report:
    """Return the report of a fit, to whose `max_error` `asked` belongs; `told` are the other fields.

    `by_core` tells what rank buys, by what `--core` calls the cores and by group.
    """
    plan, curves = fitted[0][0], by_core[core]
    by_task: list[dict[str, Any]] = [
        {
            "task": entry.name,
            "error": (error := entry.error(lost[entry.name].modules)),
            "kept": 1 - error**2,
            "cluster": lost[entry.name].cluster,
            "rank_before": entry.rank,
            "bytes_before": entry.bytes,
            "missing": len(plan.targets) - len(entry.energies),
            **scores.get(entry.name, {}),
        }
        for entry in stack.entries
    ]
    by_task.sort(key=lambda row: -row["error"])
    errors = [row["error"] for row in by_task]
    groups = [(c, group, fits[group.name]) for c, (own, fits) in enumerate(fitted) for group in own.groups]
    ranks = {key_of(c, group.name): group.rank for c, group, _ in groups}
    report = Report(
        tasks=len(stack),
        error=(sum(error * error for error in errors) / len(errors)) ** 0.5,
        median_error=median(errors),
        bytes_before=sum(entry.bytes for entry in stack.entries),
        bytes_of_heads=stack.head_bytes,
        bytes_of_numbers=stack.head_bytes + bytes_of(curves, ranks),
        groups=[
            {
                "group": group.name,
                "sites": len(group.sites),
                "block": list(group.shape),
                "ranks": list(group.rank),
                "errors": of_group.errors,
                "cluster": c,
            }
            for c, group, of_group in groups
        ],
        by_task=by_task,
        by_module=_by_module(stack, plan, lost),
        curve=one_rank_for_all(curves, stack.head_bytes),
        advice=[],
        **told,
    )
    others = {kind: own for kind, own in by_core.items() if kind != core}
    report.advice.extend(
        _about_error(report.error, curves, ranks, others, error_of_fits(fitted), asked, dtype)
    )
    report.advice.extend(_about_adapters(report, stack))
    return report


def error_of_fits(fitted: Sequence[Fitted]) -> float:
    """Return the relative error of all clusters together."""
    return error_of_all([of_group for _, fits in fitted for of_group in fits.values()])


def _by_module(stack: Stack, plan: Plan, lost: Mapping[str, Lost]) -> dict[str, float]:
    energy, left = dict.fromkeys(plan.shape_of, 0.0), dict.fromkeys(plan.shape_of, 0.0)
    for entry in stack.entries:
        for module, of_module in lost[entry.name].modules.items():
            left[module] += of_module
            energy[module] += entry.energies.get(module, 0.0)
    return {module: (left[module] / energy[module]) ** 0.5 if energy[module] else 0.0 for module in energy}


def _about_error(
    error: float,
    curves: dict[str, Curve],
    ranks: dict[str, Ranks],
    others: Mapping[str, dict[str, Curve]],
    fitted: float,
    asked: float | None,
    dtype: str,
) -> Iterator[str]:
    """Say what a smaller error takes: another rank, another type where rounding is much of it, or other cores."""
    size, missed = bytes_of(curves, ranks), asked is not None and error > asked
    if missed:
        yield f"The error that was asked for, {asked:.2g}, is not reached."
    if (error > 1e-3 and fitted < error / 2) or (missed and fitted <= float(asked or 0)):
        way_out = "" if dtype == "float32" else " Keep the numbers with --dtype float32."
        yield f"Much of this error is rounding in {dtype}.{way_out}"
    elif error > 1e-3:
        better = chosen_ranks(curves, max_error=error / 2)
        if error_of(curves, better) <= error / 2:
            yield (
                f"Half of this error takes {bytes_of(curves, better) / size:.1f} times the bytes: --max-error "
                f"{error / 2:.2g} (ranks {min(map(min, better.values()))} to {max(map(max, better.values()))})."
            )
    for core, own in others.items():
        if bytes_of(own, dict.fromkeys(own, (1, 1))) <= size:
            most = error_of(own, chosen_ranks(own, max_bytes=size))  # and it is sure to lose no more
            if most < 0.95 * error:
                yield f"In as many bytes --core {core} loses at most {most:.2g}."


def _about_adapters(report: Report, stack: Stack) -> Iterator[str]:
    """Say which adapters lose most or change nothing, and what of them and of the bank does not go together."""
    worst = report.by_task[0]
    if worst["error"] > 2 * report.median_error and worst["error"] > 1e-3:
        yield (
            f"{worst['task']} loses {worst['error']:.2g}, more than twice the median: it shares least with the others. "
            "Raise its weight, or keep it as the LoRA that it is."
        )
    if some := sorted(row["task"] for row in report.by_task if row["missing"]):
        yield f"{len(some)} adapters lack modules that others adapt, first {some[0]}; they are zero there."
    if nothing := [entry.name for entry in stack.entries if not entry.energy]:
        yield f"{len(nothing)} adapters are zero everywhere, first {nothing[0]}: they were never trained."
    for metric in dict.fromkeys(row["metric"] for row in report.by_task if "metric" in row):
        rows = [row for row in report.by_task if row.get("metric") == metric]
        before, after = (mean(row[f"score_{when}"] for row in rows) for when in ("before", "after"))
        sign = -1 if metric == "loss" else 1
        worst = min(rows, key=lambda row: sign * (row["score_after"] - row["score_before"]))
        yield (
            f"Mean {metric} of {len(rows)} tasks: {before:.4g} before, {after:.4g} after; {worst['task']} loses most, "
            f"{worst['score_before']:.4g} to {worst['score_after']:.4g}."
        )
    base, told = report.base_model, report.trained_on
    if base is not None and told is not None and not is_same_base(base, told):  # where it lies may differ
        yield f"The adapters tell {told!r}, and the bank is for {base!r}: both must be the same weights."
    if report.bytes_after >= report.bytes_before:
        numbers = report.bytes_of_numbers
        why = f"its numbers take {numbers:,} bytes, the rest is the empty store. It pays with more or larger adapters"
        if numbers >= report.bytes_before:
            why = "its numbers are: choose a smaller --rank, or --max-bytes"
        yield f"The bank is no smaller than the adapters: {why}."


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
