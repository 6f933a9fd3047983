"""`lotr bank`: tasks kept, looked at and given away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .bank_reports import table, trained
from .console import print_json, print_table, reported
from .examples import epilog
from .light import load
from .options import with_train_options
from .reports import said

BankSettings = load("lotr.training.tasks.settings").BankSettings

app = typer.Typer(
    name="bank",
    help="Keep thousands of tasks on one base model: a basis, and cores of a few kilobytes a task.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Bank = Annotated[Path, typer.Argument(help="Folder of the bank.", show_default=False)]
Name = Annotated[str, typer.Argument(help="Name of the task.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


@app.command(epilog=epilog("bank create"))
def create(
    bank: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    basis: Annotated[
        str, typer.Option(help="LoTR adapter, folder or hub id, whose factors all tasks will share.")
    ],
    dtype: Annotated[
        str, typer.Option(help="How numbers are kept: float32, bfloat16 or float16.")
    ] = "bfloat16",
    json: Json = False,
) -> None:
    """Make an empty bank on the factors of an adapter."""
    with reported(), console.stopwatch("Reading the basis"):
        from lotr.bank import CoreBank

        with CoreBank.create(bank, basis, dtype=dtype) as opened:
            report = {"bank": str(bank), **opened.stats()}
    said(
        report,
        f"An empty bank is in {bank}: {report['numbers_per_task']:,} numbers a task, which take "
        f"{report['bytes_per_task']:,} bytes in {dtype}.",
        json,
    )


@app.command(epilog=epilog("bank train"))
@with_train_options(of=BankSettings)
def train(
    tasks: Annotated[
        Path | None,
        typer.Option(help="YAML list of tasks: `name: file`, or `name: {train:, eval:, text:, label:}`."),
    ] = None,
    json: Json = False,
    **given: Any,
) -> None:
    """Train many tasks at once, in mixed batches, and keep them in a bank."""
    with reported(), console.stopwatch("Starting"):
        from lotr.training.tasks.task_list import read_tasks

        listed = [] if tasks is None else [vars(task) for task in read_tasks(tasks)]
        _train(listed, given, json)


def _train(tasks: list[dict[str, Any]], given: dict[str, Any], json: bool) -> None:
    from lotr.training.tasks.run import train_bank

    from .progress import TrainingProgress

    named = {name: value for name, value in given.items() if value is not None}
    bar = TrainingProgress()
    try:
        report = train_bank(BankSettings(**named, tasks=tuple(tasks)), console.say, [bar])
    finally:
        bar.close()
    trained(report, json)


@app.command(epilog=epilog("bank add"))
@with_train_options("Training", of=BankSettings)
def add(
    bank: Bank,
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Adapters saved on the bank's basis.", show_default=False)
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Name of the task.", show_default="the name of the adapter's folder")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="Data to train a new task on, instead of adapters.")
    ] = None,
    eval: Annotated[str | None, typer.Option(help="Data to measure the new task on.")] = None,
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    text2: Annotated[str, typer.Option(help="Column with the second text of a pair.")] = "text2",
    label: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a task that has the name already.")
    ] = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Add tasks: adapters saved on the basis (all of them, or none), or one that is trained on data."""
    with reported(), console.stopwatch("Adding"):
        if train is not None:
            if adapters or task is None:
                raise console.usage_error(
                    "--train trains one task: name it with --task, and name no adapters."
                )
            columns = {"text": text, "text2": text2, "label": label}
            source = {"name": task, "train": train, "eval": eval, **columns}
            return _train([source], {**given, "output": str(bank), "replace": replace}, json)
        if not adapters:
            raise console.usage_error(
                "There is nothing to add. Name adapters, or data with --task and --train."
            )
        if task is not None and len(adapters) > 1:
            raise console.usage_error(
                f"--task {task} names one task, and there are {len(adapters)} adapters."
            )
        from lotr.bank import CoreBank

        names = [task or Path(adapter).resolve().name for adapter in adapters]
        with CoreBank.open(bank, writable=True) as opened:
            tasks = (
                opened.from_adapter(name, adapter) for name, adapter in zip(names, adapters, strict=True)
            )
            error = opened.add_many(tasks, replace=replace)
            report = {"added": names, "dtype": opened.dtype, "rounding_error": error, "tasks": len(opened)}
    line = f"Added {', '.join(names)}. Rounding to {report['dtype']} cost at most {error:.2g} of the cores' norm."
    return said(report, f"{line} The bank has {report['tasks']:,} tasks.", json)


@app.command("list", epilog=epilog("bank list"))
def list_tasks(
    bank: Bank,
    limit: Annotated[int, typer.Option(min=0, help="How many tasks to show; 0 shows all.")] = 100,
    after: Annotated[str, typer.Option(help="Show the tasks whose names come behind this one.")] = "",
    json: Json = False,
) -> None:
    """List tasks in the order of their names."""
    with reported(), console.stopwatch("Reading"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank) as opened:
            total, shown = len(opened), opened.overview(after, limit or -1)
    if json:
        return print_json({"bank": str(bank), "tasks": total, "shown": shown})
    print_table(str(bank), ("task", "kind", "classes", "created"), [tuple(row.values()) for row in shown])
    rest = f", {len(shown):,} of them shown; --limit and --after show others" if len(shown) < total else ""
    return said({}, f"{total:,} tasks{rest}.", as_json=False)


@app.command(epilog=epilog("bank show"))
def show(bank: Bank, name: Name, json: Json = False) -> None:
    """Show what is known of a task."""
    with reported(), console.stopwatch("Reading"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank) as opened:
            report = opened.about(name)
    table("", report, json)


@app.command(epilog=epilog("bank remove"))
def remove(
    bank: Bank,
    names: Annotated[list[str], typer.Argument(help="Names of tasks.", show_default=False)],
    json: Json = False,
) -> None:
    """Remove tasks: all of those named, or none."""
    with reported(), console.stopwatch("Removing"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank, writable=True) as opened:
            opened.remove(*names)
            left = len(opened)
    said({"removed": names, "tasks": left}, f"Removed {', '.join(names)}. The bank has {left:,} tasks.", json)


@app.command(epilog=epilog("bank rename"))
def rename(
    bank: Bank,
    old: Name,
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    json: Json = False,
) -> None:
    """Give a task another name."""
    with reported(), console.stopwatch("Renaming"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank, writable=True) as opened:
            opened.rename(old, new)
    said({"old": old, "new": new}, f"{old} is now called {new}.", json)


@app.command(epilog=epilog("bank verify"))
def verify(bank: Bank, json: Json = False) -> None:
    """Read the basis, every page and every task with its checksum; ends with 1 when anything is damaged."""
    with reported(), console.stopwatch("Opening"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank) as opened, console.counting("Verifying") as tick:
            report = opened.verify(tick)
    if json:
        print_json(report)
    elif report["damaged"]:
        print_table("Damaged tasks", ("task", "why"), [(d["task"], d["reason"]) for d in report["damaged"]])
    whole = report["tasks"] - len(report["damaged"])
    for complaint in ([report["basis"]] if report["basis"] else []) + report["file"]:
        console.say(complaint)
    if not json:
        said({}, f"{whole:,} of {report['tasks']:,} tasks are whole.", as_json=False)
    if not report["ok"]:
        raise typer.Exit(1)


@app.command(epilog=epilog("bank recover"))
def recover(
    bank: Bank,
    output: Annotated[Path, typer.Option(help="Folder for the new bank.")],
    json: Json = False,
) -> None:
    """Save what can still be read of a damaged bank into a new one; ends with 1 when a task is lost."""
    with reported(), console.stopwatch("Reading"):
        from lotr.bank.recover import recover as save

        with console.counting("Recovering") as tick:
            report = save(bank, output, tick)
    lost = "how many are lost is not known" if report["lost"] is None else f"{len(report['lost']):,} are lost"
    said(report, f"{report['saved']:,} tasks are in {output}; {lost}.", json)
    if report["lost"] != []:
        raise typer.Exit(1)


@app.command(epilog=epilog("bank export"))
def export(
    bank: Bank,
    name: Name,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    lora: Annotated[bool, typer.Option("--lora", help="Write plain PEFT LoRA, exactly.")] = False,
    refer: Annotated[
        bool, typer.Option("--refer", help="Leave the factors out and refer to the bank.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    json: Json = False,
) -> None:
    """Write one task as a LoTR adapter, or as plain LoRA."""
    with reported(), console.stopwatch("Exporting"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank) as opened:
            report = opened.export(name, output, as_lora=lora, refer=refer, overwrite=overwrite)
    what = "A LoRA" if lora else "An adapter"
    said(report, f"{what} of {report['numbers']:,} numbers, {report['bytes']:,} bytes, is in {output}.", json)


@app.command(epilog=epilog("bank stats"))
def stats(bank: Bank, json: Json = False) -> None:
    """Show counts and bytes."""
    with reported(), console.stopwatch("Counting"):
        from lotr.bank import CoreBank

        with CoreBank.open(bank) as opened:
            report = opened.stats()
    table(str(bank), report, json)
