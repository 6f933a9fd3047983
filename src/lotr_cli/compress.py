"""`lotr compress`: many LoRAs become one bank; or one adapter a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lotr.errors import ConfigError

from . import console
from .console import Report, table

_ROWS = 5  # tasks and modules that the tables show, the worst first
_MANY = 24  # groups that are shown one by one


def compress(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="PEFT LoRAs or adapters of this library: folders, globs, hub ids, or a .txt file with a path a line. "
            "With --add, the bank first. One adapter of this library alone is cut down to a smaller one.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the new bank, or of the smaller adapter.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model.", show_default="the one that the adapters tell")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the adapters to a bank, on its factors.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="With --add: replace tasks that have the names already.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of every group.", show_default="16 without any size")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Instead of a rank: the relative error to reach, by group as it takes."),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Instead of a rank: bytes of factors, cores and heads, such as 20MB.")
    ] = None,
    modes: Annotated[
        str, typer.Option(help="Along what factors are shared: task, and also layer, projection.")
    ] = "task",
    core: Annotated[str, typer.Option(help="Cores of a task: free, or diagonal.")] = "free",
    weights: Annotated[
        str,
        typer.Option(help="relative: every adapter's relative error counts alike; absolute: as they are."),
    ] = "relative",
    dtype: Annotated[
        str, typer.Option(help="How cores are kept: float32, bfloat16 or float16.")
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> Report:
    """Fit one bank to many LoRAs: shared factors, and a core of a few kilobytes a task."""
    if add:
        if len(adapters) < 2 or output is not None:
            raise ConfigError(
                "--add takes a bank and then adapters, and no --output: lotr compress BANK --add A B"
            )
        from lotr.compression.add import add as project

        with console.stages() as tick:
            return _added(project(adapters[0], adapters[1:], replace=replace, tick=tick))
    if output is None:
        raise ConfigError("Name the folder of the bank to make with --output.")
    from lotr.compression.sources import is_one_adapter

    if is_one_adapter(adapters):
        from lotr.compression.cut import cut

        return _cut(cut(adapters[0], output, base, rank=rank, max_error=max_error, overwrite=overwrite))
    from lotr.compression.run import compress as fit

    with console.stages() as tick:
        report = fit(
            adapters,
            output,
            base,
            rank=rank,
            max_error=max_error,
            max_bytes=max_bytes,
            modes=modes.replace(" ", "").split(","),
            core=core,
            weights=weights,
            dtype=dtype,
            overwrite=overwrite,
            tick=tick,
        )
    return _fitted(report)


def _fitted(report: dict[str, Any]) -> Report:
    """Show what became of many adapters."""
    groups, shown = report["groups"], list[Table | str]()
    if len(groups) > _MANY:
        ranks = [group["rank"] for group in groups]
        shown.append(f"{len(groups)} groups of ranks {min(ranks)} to {max(ranks)}; the JSON report has each.")
    else:
        rows = [
            (g["group"], g["sites"], "×".join(map(str, g["block"])), g["rank"], g["errors"][-1])
            for g in groups
        ]
        shown.append(table("", ("group", "sites", "block", "rank", "error"), rows))
    names = ("task", "error", "kept", "rank_before", "bytes_before")
    rows = [tuple(task[name] for name in names) for task in report["by_task"][:_ROWS]]
    header = ("task", "error", "energy kept", "rank before", "bytes before")
    worst = sorted(report["by_module"].items(), key=lambda pair: -pair[1])[:_ROWS]
    shown += [
        table("Tasks that lose most", header, rows),
        table("Modules that lose most", ("module", "error"), worst),
        *report["advice"],
        f"{report['tasks']:,} tasks are in {report['bank']}: relative error {report['error']:.3g}, "
        f"{report['bytes_after']:,} bytes instead of {report['bytes_before']:,}. The report is in compress.json there, "
        "and error against bytes in compress.png.",
    ]
    return Report(report, shown)


def _added(report: dict[str, Any]) -> Report:
    """Show what became of later adapters."""
    rows = sorted(report["added"].items(), key=lambda pair: -pair[1])
    tasks = f"The bank in {report['bank']} has {report['tasks']:,} tasks."
    return Report(report, [table("", ("task", "error"), rows), *report["advice"], tasks])


def _cut(report: dict[str, Any]) -> Report:
    """Show what became of one adapter."""
    rows = [(g["group"], str(g["before"]), str(g["after"]), g["kept"]) for g in report["groups"]]
    before, after = report["bytes_before"], report["bytes_after"]
    size = f"The adapter is in {report['output']}: {after:,} bytes instead of {before:,}."
    return Report(report, [table("", ("group", "rank before", "rank after", "energy kept"), rows), size])
