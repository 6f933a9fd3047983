"""`lotr bank` and `lotr serve`: tasks kept, looked at, given away, and answering over HTTP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from lotr.errors import ConfigError
from lotr.serving.settings import ServeSettings
from lotr.training.tasks.settings import BankSettings

from . import console, reports
from .command import command
from .console import Report, table

if TYPE_CHECKING:
    from lotr.bank import CoreBank

app = typer.Typer(
    name="bank",
    help="Keep thousands of tasks on one base model: a basis, and cores of a few kilobytes a task.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Bank = Annotated[Path, Argument(help="Folder of the bank.", show_default=False)]
Name = Annotated[str, Argument(help="Name of the task.", show_default=False)]


def _open(bank: Path, writable: bool = False) -> CoreBank:
    from lotr.bank import CoreBank

    return CoreBank.open(bank, writable=writable)


@command(app, "bank create", "Reading the basis")
def create(
    bank: Annotated[Path, Argument(help="Folder to make.", show_default=False)],
    basis: Annotated[str, Option(help="LoTR adapter, folder or hub id, whose factors all tasks will share.")],
    dtype: Annotated[str, Option(help="How numbers are kept: float32, bfloat16 or float16.")] = "bfloat16",
) -> Report:
    """Make an empty bank on the factors of an adapter."""
    from lotr.bank import CoreBank

    with CoreBank.create(bank, basis, dtype=dtype) as opened:
        report = {"bank": str(bank), **opened.stats()}
    line = (
        f"An empty bank is in {bank}: {report['numbers_per_task']:,} numbers a task, which take "
        f"{report['bytes_per_task']:,} bytes in {dtype}."
    )
    return Report(report, [line])


@command(app, "bank train", "Starting", settings=BankSettings, loads_base=True)
def train(
    tasks: Annotated[
        Path | None,
        Option(help="YAML list of tasks: `name: file`, or `name: {train:, eval:, text:, label:}`."),
    ] = None,
    **options: Any,
) -> Report:
    """Train many tasks at once, in mixed batches, and keep them in a bank."""
    from lotr.training.tasks.task_list import read_tasks

    sources = [] if tasks is None else [vars(task) for task in read_tasks(tasks)]
    return _train(sources, options)


def _train(tasks: list[dict[str, Any]], options: dict[str, Any]) -> Report:
    from lotr.training.tasks.run import train_bank

    from .progress import TrainingProgress

    named = {name: value for name, value in options.items() if value is not None}
    if tasks:
        named["tasks"] = tuple(tasks)
    report = train_bank(say=console.say, callbacks=[TrainingProgress()], **named)
    return reports.trained_tasks(report)


@command(app, "bank add", "Adding", settings=BankSettings, panels=["Training"], loads_base=True)
def add(
    bank: Bank,
    adapters: Annotated[
        list[str] | None, Argument(help="Adapters saved on the bank's basis.", show_default=False)
    ] = None,
    task: Annotated[str | None, Option(help="Name of the task.", show_default="the adapter's folder")] = None,
    train: Annotated[str | None, Option(help="Data to train a new task on, instead of adapters.")] = None,
    eval: Annotated[str | None, Option(help="Data to measure the new task on.")] = None,
    text: Annotated[str, Option(help="Column with the text.")] = "text",
    text2: Annotated[str, Option(help="Column with the second text of a pair.")] = "text2",
    label: Annotated[str, Option(help="Column with the label.")] = "label",
    kind: Annotated[
        str | None,
        Option(help="classification, regression or causal-lm.", show_default="guessed from the label"),
    ] = None,
    model: Annotated[str | None, Option(help="Base model.", show_default="the one of the bank")] = None,
    max_length: Annotated[
        int | None, Option(help="Longest text, in tokens.", show_default="128, or as many as the model takes")
    ] = None,
    replace: Annotated[bool, Option("--replace", help="Replace a task that has the name already.")] = False,
    **options: Any,
) -> Report:
    """Add tasks: adapters saved on the basis (all of them, or none), or one that is trained on data."""
    options |= {"model": model, "max_length": max_length}
    if train is not None:
        if adapters or task is None:
            raise ConfigError("--train trains one task: name it with --task, and name no adapters.")
        source = {"name": task, "train": train, "eval": eval, "text": text, "text2": text2, "label": label}
        source["task"] = kind
        return _train([source], {**options, "output": str(bank), "replace": replace})
    if not adapters:
        raise ConfigError("There is nothing to add. Name adapters, or data with --task and --train.")
    usual = {"text": "text", "text2": "text2", "label": "label"}
    of_data = {"eval": eval, "kind": kind, "text": text, "text2": text2, "label": label, **options}
    if idle := [name for name, value in of_data.items() if value not in (None, usual.get(name))]:
        raise ConfigError(
            f"--{idle[0].replace('_', '-')} means nothing without --train: adapters are added as they are."
        )
    if task is not None and len(adapters) > 1:
        raise ConfigError(f"--task {task} names one task, and there are {len(adapters)} adapters.")
    sources: dict[str, str] = {}
    for adapter in adapters:
        name = task or Path(adapter).resolve().name
        if name in sources:
            raise ConfigError(
                f"{sources[name]} and {adapter} would both be the task {name!r}. Add them one by one with --task."
            )
        sources[name] = adapter
    with _open(bank, writable=True) as opened:
        tasks = (opened.from_adapter(name, adapter) for name, adapter in sources.items())
        error = opened.add_many(tasks, replace=replace)
        report = {
            "added": list(sources),
            "dtype": opened.dtype,
            "rounding_error": error,
            "tasks": len(opened),
        }
    line = (
        f"Added {', '.join(sources)}. Rounding to {report['dtype']} cost at most {error:.2g} of the cores' norm. "
        f"The bank has {report['tasks']:,} tasks."
    )
    return Report(report, [line])


@command(app, "bank list", "Reading")
def list_tasks(
    bank: Bank,
    limit: Annotated[int, Option(min=0, help="How many tasks to show; 0 shows all.")] = 100,
    after: Annotated[str, Option(help="Show the tasks whose names come behind this one.")] = "",
) -> Report:
    """List tasks in the order of their names."""
    with _open(bank) as opened:
        total, shown = len(opened), opened.overview(after, limit or -1)
    rows = [tuple(row.values()) for row in shown]
    rest = f", {len(shown):,} of them shown; --limit and --after show others" if len(shown) < total else ""
    listed = table(str(bank), ("task", "kind", "classes", "created"), rows)
    return Report({"bank": str(bank), "tasks": total, "shown": shown}, [listed, f"{total:,} tasks{rest}."])


@command(app, "bank show", "Reading")
def show(bank: Bank, name: Name) -> Report:
    """Show what is known of a task."""
    with _open(bank) as opened:
        return reports.properties("", opened.about(name))


@command(app, "bank remove", "Removing")
def remove(
    bank: Bank, names: Annotated[list[str], Argument(help="Names of tasks.", show_default=False)]
) -> Report:
    """Remove tasks: all of those named, or none."""
    with _open(bank, writable=True) as opened:
        opened.remove(*names)
        left = len(opened)
    line = f"Removed {', '.join(names)}. The bank has {left:,} tasks."
    return Report({"removed": names, "tasks": left}, [line])


@command(app, "bank rename", "Renaming")
def rename(
    bank: Bank, old: Name, new: Annotated[str, Argument(help="Its new name.", show_default=False)]
) -> Report:
    """Give a task another name."""
    with _open(bank, writable=True) as opened:
        opened.rename(old, new)
    return Report({"old": old, "new": new}, [f"{old} is now called {new}."])


@command(app, "bank verify", "Opening")
def verify(bank: Bank) -> Report:
    """Read every file, every page and every task with its checksum; ends with 1 when anything is damaged."""
    from lotr.bank.recover import verify as read_all

    report = read_all(bank, partial(console.tick, "Verifying"))
    for complaint in report["files"]:
        console.say(complaint)
    rows = [(damage["task"], damage["reason"]) for damage in report["damaged"]]
    tables = [table("Damaged tasks", ("task", "why"), rows)] if rows else []
    line = f"{report['tasks'] - len(rows):,} of {report['tasks']:,} tasks are whole."
    return Report(report, [*tables, line], ok=report["ok"])


@command(app, "bank recover", "Reading")
def recover(bank: Bank, output: Annotated[Path, Option(help="Folder for the new bank.")]) -> Report:
    """Save what can still be read of a damaged bank into a new one; ends with 1 when a task is lost."""
    from lotr.bank.recover import recover as save

    report = save(bank, output, partial(console.tick, "Recovering"))
    lost = "how many are lost is not known" if report["lost"] is None else f"{len(report['lost']):,} are lost"
    line = f"{report['saved']:,} tasks are in {output}; {lost}."
    return Report(report, [line], ok=report["lost"] == [])


@command(app, "bank export", "Exporting")
def export(
    bank: Bank,
    name: Name,
    output: Annotated[Path, Option(help="Folder for the adapter.")],
    lora: Annotated[bool, Option("--lora", help="Write plain PEFT LoRA, exactly.")] = False,
    refer: Annotated[bool, Option("--refer", help="Leave the factors out and refer to the bank.")] = False,
    pad_rank: Annotated[
        int | None, Option(min=1, help="With --lora: rank to bring all modules to, with zeros.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an output that exists.")] = False,
) -> Report:
    """Write one task as a LoTR adapter, or as plain LoRA."""
    with _open(bank) as opened:
        report = opened.export(
            name, output, as_lora=lora, refer=refer, overwrite=overwrite, pad_rank=pad_rank
        )
    what = "A LoRA" if lora else "An adapter"
    line = f"{what} of {report['numbers']:,} numbers, {report['bytes']:,} bytes, is in {output}."
    return Report(report, [line])


@command(app, "bank stats", "Counting")
def stats(bank: Bank) -> Report:
    """Show counts and bytes."""
    with _open(bank) as opened:
        return reports.properties(str(bank), opened.stats())


Token = Annotated[str | None, Option(envvar="LOTR_TOKEN", help="Clients must send it.", show_default="none")]
AdminToken = Annotated[
    str | None,
    Option(envvar="LOTR_ADMIN_TOKEN", help="What allows to add and remove tasks.", show_default="nobody may"),
]


def serve(
    bank: Bank,
    host: Annotated[str, Option(help="Where to listen; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    model: Annotated[str | None, Option(help="Base model.", show_default="the one of the bank")] = None,
    dtype: Annotated[str, Option(help="Type of the base model.")] = "float32",
    capacity: Annotated[str, Option(help="Tasks in memory: a number, or bytes such as 256MB.")] = "1024",
    token: Token = None,
    admin_token: AdminToken = None,
    **limits: Any,
) -> Report:
    """Answer over HTTP with the tasks of a bank, in batches mixed from all of them."""
    try:
        from lotr.serving.run import run
    except ModuleNotFoundError as error:
        raise ConfigError(f"This needs {error.name}: pip install 'lotr[serve]'.") from None
    given = {name: value for name, value in limits.items() if value is not None}
    settings = ServeSettings(**given, token=token, admin_token=admin_token)
    size = int(capacity) if capacity.isdigit() else capacity
    answered = run(bank, settings, host, port, model, dtype, size, console.calm)
    return Report({"requests": answered}, [f"{answered:,} requests were answered."])
