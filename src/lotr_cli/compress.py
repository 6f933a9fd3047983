"""`lotr compress`: many LoRAs become one bank; or one adapter a smaller one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lotr.errors import ConfigError

from . import console
from .console import Report, table

if TYPE_CHECKING:
    from lotr.compression.report import Report as Compressed

_ROWS = 5  # tasks and modules that the tables show, the worst first
_MANY = 24  # groups that are shown one by one
_DEFAULTS = {"modes": "task", "core": "free", "weights": "relative", "dtype": "bfloat16"}


def compress(
    adapters: Annotated[
        list[str],
        Argument(
            help="PEFT LoRAs or adapters of this library: folders, globs, hub ids, or a .txt file with a path a line. "
            "With --add, the bank first. One adapter of this library alone is cut down to a smaller one.",
            show_default=False,
        ),
    ],
    output: Annotated[Path | None, Option(help="Folder of the new bank, or of the smaller adapter.")] = None,
    base: Annotated[
        str | None, Option(help="Base model.", show_default="the one that the adapters tell")
    ] = None,
    add: Annotated[bool, Option("--add", help="Add the adapters to a bank, on its factors.")] = False,
    replace: Annotated[
        bool, Option("--replace", help="With --add: replace tasks that have the names already.")
    ] = False,
    rank: Annotated[
        int | None, Option(min=1, help="Rank of every group.", show_default="16 without any size")
    ] = None,
    max_error: Annotated[
        float | None,
        Option(help="Instead of a rank: the relative error to reach, by group as it takes."),
    ] = None,
    max_bytes: Annotated[
        str | None, Option(help="Instead of a rank: bytes of factors, cores and heads, such as 20MB.")
    ] = None,
    modes: Annotated[
        str, Option(help="Along what factors are shared: task, and also layer, projection.")
    ] = _DEFAULTS["modes"],
    core: Annotated[str, Option(help="Cores of a task: free, or diagonal.")] = _DEFAULTS["core"],
    weights: Annotated[
        str,
        Option(help="relative: every adapter's relative error counts alike; absolute: as they are."),
    ] = _DEFAULTS["weights"],
    dtype: Annotated[
        str, Option(help="How factors and cores are kept: float32, bfloat16 or float16.")
    ] = _DEFAULTS["dtype"],
    evaluate: Annotated[
        Path | None,
        Option(
            help="List of tasks (YAML, as `lotr bank train` takes it): scores on their own data, before and after."
        ),
    ] = None,
    ray: Annotated[
        str | None, Option(help="Fit on a Ray cluster: local, or its address.", show_default="in one process")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an output that exists.")] = False,
) -> Report:
    """Fit one bank to many LoRAs: shared factors, and a core of a few kilobytes a task."""
    shared: Any = {"modes": modes, "core": core, "weights": weights, "dtype": dtype}
    if add:
        if len(adapters) < 2 or output is not None:
            raise ConfigError(
                "--add takes a bank and then adapters, and no --output: lotr compress BANK --add A B"
            )
        sizes = {"rank": rank, "max_error": max_error, "max_bytes": max_bytes}
        other: Any = {"base": base, "overwrite": overwrite, "evaluate": evaluate, "ray": ray}
        _refuse("with --add: the bank has its factors", **other, **sizes, **shared)
        from lotr.compression.add import add as project

        with console.phases() as tick:
            return _added(project(adapters[0], adapters[1:], replace=replace, tick=tick))
    if output is None:
        raise ConfigError("Name the folder of the bank to make with --output.")
    _refuse("without --add", replace=replace)
    size: Any = {"rank": rank, "max_error": max_error, "overwrite": overwrite}
    from lotr.compression.sources import is_one_adapter

    own: Any = {"max_bytes": max_bytes, "evaluate": evaluate, "ray": ray}
    if is_one_adapter(adapters):
        _refuse("for one adapter, which stays an adapter", **own, **shared)
        from lotr.compression.cut import cut

        return _cut(cut(adapters[0], output, base, **size))
    from lotr.compression.run import compress as fit

    shared["modes"] = modes.replace(" ", "").split(",")
    with console.phases() as tick:
        return _fitted(fit(adapters, output, base, **own, **size, **shared, tick=tick))


def _refuse(case: str, **options: Any) -> None:
    """Refuse options that have no effect in one of the command's uses."""
    for name, value in options.items():
        if value not in (None, False, _DEFAULTS.get(name)):
            raise ConfigError(f"--{name.replace('_', '-')} means nothing {case}. Leave it out.")


def _fitted(report: Compressed) -> Report:
    """Show what became of many adapters."""
    groups = report.groups
    rows = [
        (g["group"], g["sites"], "×".join(map(str, g["block"])), g["rank"], g["errors"][-1]) for g in groups
    ]
    of_groups: Any = table("", ("group", "sites", "block", "rank", "error"), rows)
    if len(groups) > _MANY:
        ranks = [group["rank"] for group in groups]
        of_groups = f"{len(groups)} groups of ranks {min(ranks)} to {max(ranks)}; the JSON report has each."
    names = ("task", "error", "kept", "rank_before", "bytes_before")
    tasks = [tuple(task[name] for name in names) for task in report.by_task[:_ROWS]]
    scored = ("task", "metric", "score_before", "score_after", "error")
    scores = [tuple(task[name] for name in scored) for task in report.by_task if "metric" in task]
    modules = sorted(report.by_module.items(), key=lambda pair: -pair[1])[:_ROWS]
    return Report(
        asdict(report),
        [
            of_groups,
            table(
                "Tasks that lose most", ("task", "error", "energy kept", "rank before", "bytes before"), tasks
            ),
            table("Modules that lose most", ("module", "error"), modules),
            *([table("Scores", ("task", "metric", "before", "after", "error"), scores)] if scores else []),
            *report.advice,
            f"{report.tasks:,} tasks are in {report.bank}: relative error {report.error:.3g}, "
            f"{report.bytes_after:,} bytes instead of {report.bytes_before:,}. The report is in compress.json "
            "there, and error against bytes in compress.png.",
        ],
    )


def _added(report: dict[str, Any]) -> Report:
    """Show what became of later adapters."""
    rows = sorted(report["added"].items(), key=lambda pair: -pair[1])
    line = f"The bank in {report['bank']} has {report['tasks']:,} tasks."
    return Report(report, [table("", ("task", "error"), rows), *report["advice"], line])


def _cut(report: dict[str, Any]) -> Report:
    """Show what became of one adapter."""
    rows = [(g["group"], str(g["before"]), str(g["after"]), g["kept"]) for g in report["groups"]]
    line = (
        f"The adapter is in {report['output']}: {report['bytes_after']:,} bytes instead of "
        f"{report['bytes_before']:,}."
    )
    return Report(report, [table("", ("group", "rank before", "rank after", "energy kept"), rows), line])
