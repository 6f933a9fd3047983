"""`lotr compress`: many LoRAs become one bank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .console import print_json, print_line, print_table, reported

_WORST = 5  # tasks that the table shows


def compress(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="PEFT LoRAs or adapters of this library: folders, globs, hub ids, or a .txt file with a path a line.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new bank.")],
    base: Annotated[
        str | None, typer.Option(help="Base model.", show_default="the one that the adapters tell")
    ] = None,
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
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Fit one bank to many LoRAs: shared factors, and a core of a few kilobytes a task."""
    with reported(), console.stopwatch("Starting"):
        from lotr.compression.run import compress as fit

        with console.working() as tick:
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
    _show(report, json)


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(report)
    print_table(
        report["bank"],
        ("group", "sites", "block", "rank", "error"),
        [
            (
                group["group"],
                group["sites"],
                "×".join(map(str, group["block"])),
                group["rank"],
                group["error"],
            )
            for group in report["groups"]
        ],
    )
    by_task = {task["task"]: task for task in report["by_task"]}
    print_table(
        "the least well kept",
        ("task", "error", "energy kept", "rank before", "bytes before"),
        [
            (name, *(by_task[name][key] for key in ("error", "kept", "rank_before", "bytes_before")))
            for name in report["worst"][:_WORST]
        ],
    )
    print_line(
        f"{report['tasks']:,} tasks in {report['bank']}: relative error {report['error']:.3g}, "
        f"{report['bytes_after']:,} bytes instead of {report['bytes_before']:,}."
    )
    return None
