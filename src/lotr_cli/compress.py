"""`lotr compress`: many LoRAs become one bank; or one adapter a smaller one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from lotr.errors import ConfigError
from lotr.training.settings import panel

from . import console
from .console import Report, table

if TYPE_CHECKING:
    from lotr.compression.report import Report as Compressed

_ROWS = 5  # tasks and modules that the tables show, the worst first
_MANY = 24  # groups that are shown one by one
_option = panel("Options")


@dataclass(frozen=True)
class Options:
    """What `lotr compress` is told beside the adapters; what is not given is as the library has it."""

    output: str | None = _option("Folder of the new bank, or of the smaller adapter.", shown="not with --add")
    base: str | None = _option("Base model.", "the one that the adapters tell")
    add: bool = _option("Add the adapters to a bank, on its factors.", default=False)
    replace: bool = _option("With --add: replace tasks that have the names already.", default=False)
    rank: int | None = _option("Rank of every group.", "16 without any size")
    max_error: float | None = _option(
        "Instead of a rank: the relative error to reach; each group and side has the rank that this takes.",
        "none",
    )
    max_bytes: str | None = _option("Instead of a rank: bytes of factors, cores and heads, as 20MB.", "none")
    modes: str = _option("Factors shared along: task, and also layer, projection, expert.", default="task")
    core: str = _option("Cores of a task: free, or diagonal.", default="free")
    clusters: str = _option(
        "Group the adapters by their subspaces, with factors for each: a number, or auto, as many as pay.",
        default="1",
    )
    weights: str = _option(
        "relative: every adapter's relative error counts alike; absolute: as they are.", default="relative"
    )
    dtype: str = _option("How factors and cores are kept: float32, bfloat16 or float16.", default="bfloat16")
    evaluate: str | None = _option(
        "List of tasks (YAML, as `lotr bank train` takes it): scores on their own data, before and after.",
        "none",
    )
    ray: str | None = _option("Fit on a Ray cluster: local, or its address.", "in one process")
    overwrite: bool = _option("Replace an output that exists.", default=False)


def compress(
    adapters: Annotated[
        list[str],
        Argument(
            help="PEFT LoRAs or adapters of this library: folders, globs, hub ids, or a .txt file with a path a line. "
            "With --add, the bank first. One adapter of this library alone is cut down to a smaller one.",
            show_default=False,
        ),
    ],
    **options: Any,
) -> Report:
    """Fit one bank to many LoRAs: shared factors, and a core of a few kilobytes a task."""
    given = {name: value for name, value in options.items() if value is not None}
    output = given.pop("output", None)
    if given.pop("add", False):
        if len(adapters) < 2 or output is not None:
            raise ConfigError(
                "--add takes a bank and then adapters, and no --output: lotr compress BANK --add A B"
            )
        _check(given, {"replace"}, "with --add: the bank has its factors")
        from lotr.compression.add import add

        return _added(add(adapters[0], adapters[1:], **given, tick=console.tick))
    if output is None:
        raise ConfigError("Name the folder of the bank to make with --output.")
    _check(given, options.keys() - {"replace"}, "without --add")
    from lotr.compression.sources import is_one_adapter

    if is_one_adapter(adapters):
        _check(given, {"base", "rank", "max_error", "overwrite"}, "for one adapter, which stays an adapter")
        from lotr.compression.cut import cut

        return _cut(cut(adapters[0], output, **given))
    from lotr.compression.run import compress as fit

    return _fitted(fit(adapters, output, **given, tick=console.tick))


def _check(given: Iterable[str], allowed: Collection[str], case: str) -> None:
    """Refuse options that have no effect in one of the command's uses."""
    for name in given:
        if name not in allowed:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing {case}. Leave it out.")


def _fitted(report: Compressed) -> Report:
    """Show what became of many adapters."""
    clusters = 1 + max(g["cluster"] for g in report.groups)
    rows = [
        (
            g["group"],
            *([g["cluster"]] if clusters > 1 else []),
            g["sites"],
            "×".join(map(str, g["block"])),
            " × ".join(map(str, g["ranks"])),
            g["errors"][-1],
        )
        for g in report.groups
    ]
    names = ("group", *(["cluster"] if clusters > 1 else []), "sites", "block", "core", "error")
    of_groups: Any = table("", names, rows)
    if len(rows) > _MANY:
        ranks = [rank for group in report.groups for rank in group["ranks"]]
        of_groups = f"{len(rows)} groups of ranks {min(ranks)} to {max(ranks)}; the JSON report has each."
    of_task = ("task", "error", "kept", "rank_before", "bytes_before")
    tasks = [tuple(task[name] for name in of_task) for task in report.by_task[:_ROWS]]
    scored = ("task", "metric", "score_before", "score_after", "error")
    scores = [tuple(task[name] for name in scored) for task in report.by_task if "metric" in task]
    modules = sorted(report.by_module.items(), key=lambda pair: -pair[1])[:_ROWS]
    lost = ("task", "error", "energy kept", "rank before", "bytes before")
    tables = [
        table("Tasks that lose most", lost, tasks),
        table("Modules that lose most", ("module", "error"), modules),
    ]
    if scores:
        tables.append(table("Scores", ("task", "metric", "before", "after", "error"), scores))
    sizes = Counter(task["cluster"] for task in report.by_task)
    apart = f" in clusters of {', '.join(str(sizes[c]) for c in range(clusters))}" if clusters > 1 else ""
    line = (
        f"{report.tasks:,} tasks are in {report.bank}{apart}: relative error {report.error:.3g}, "
        f"{report.bytes_after:,} bytes instead of {report.bytes_before:,}. The report is in compress.json there, and "
        "error against bytes in compress.png."
    )
    return Report(asdict(report), [of_groups, *tables, *report.advice, line])


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
