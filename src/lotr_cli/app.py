"""`lotr`: the commands. Each is one call of the library; nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from lotr.serving.settings import ServeSettings
from lotr.training.settings import TrainSettings, read_options

from . import bank, compress, console, reports
from .command import command
from .console import Report

app = typer.Typer(
    name="lotr",
    help="Tensor-rank adapters: fine-tune, evaluate, inspect, merge and export. ΔW = σ·U·C·Vᵀ.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bank.app)
command(app, "compress", "Starting", settings=compress.Options, loads_base=True)(compress.compress)

Adapter = Annotated[str, Argument(help="Adapter folder or hub id.", show_default=False)]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output that exists.")]
Base = Annotated[str | None, Option("--model", help="Base model.", show_default="the one of the adapter")]
Data = Annotated[str, Option("--data", help="Data: a file, folder, hub data set or `docstrings`.")]
Text = Annotated[str | None, Option("--text", help="Column with the text.", show_default="as in training")]
Text2 = Annotated[
    str | None, Option("--text2", help="Column with the second text.", show_default="as in training")
]
BatchSize = Annotated[int, Option("--batch-size", min=1, max=10**6, help="Rows at a time.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("lotr"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Set what holds for every command."""
    console.debug = debug
    if not debug:  # what the libraries underneath plan to rename is no news for who runs a command
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


@command(app, "train", "Starting", settings=TrainSettings, loads_base=True)
def train(
    config: Annotated[Path | None, Option(help="YAML file with any of these settings.")] = None,
    **options: Any,
) -> Report | None:
    """Fine-tune a model; writes the adapter, `metrics.json`, `curve.png` and a model card."""
    options = read_options(options, config)
    from lotr.training.process import is_main_process, leave_processes
    from lotr.training.run import train as run

    from .progress import TrainingProgress

    try:
        report = run(say=console.say, callbacks=[TrainingProgress()], **options)
        return reports.trained(report) if is_main_process() else None
    finally:
        leave_processes()


@command(app, "evaluate", "Loading", loads_base=True)
def evaluate(
    adapter: Adapter,
    data: Data,
    text: Text = None,
    text2: Text2 = None,
    label: Annotated[str | None, Option(help="Column with the label.", show_default="as in training")] = None,
    model: Base = None,
    batch_size: BatchSize = 64,
    picture: Annotated[
        Path | None,
        Option(help="Confusion matrix as PNG.", show_default="confusion.png in the adapter's folder"),
    ] = None,
) -> Report:
    """Measure an adapter on data; draws the confusion matrix."""
    from lotr.training.predict import evaluate as measure

    picture = picture or reports.beside(adapter, "confusion.png")
    options: Any = {"text": text, "text2": text2, "label": label, "model": model, "batch_size": batch_size}
    scores = measure(adapter, data, **options, picture=picture, tick=partial(console.tick, "Evaluating"))
    return reports.evaluated(adapter, data, scores, picture)


@command(app, "predict", "Loading", loads_base=True)
def predict(
    adapter: Annotated[str, Argument(help="Adapter folder, hub id, or bank.", show_default=False)],
    data: Data,
    output: Annotated[Path, Option(help="File to write: .csv or .jsonl.")],
    task: Annotated[str | None, Option(help="Of a bank: the task that answers all rows.")] = None,
    task_column: Annotated[str | None, Option(help="Of a bank: column with the task of each row.")] = None,
    text: Text = None,
    text2: Text2 = None,
    model: Base = None,
    batch_size: BatchSize = 64,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer of a language model.")] = 64,
    overwrite: Overwrite = False,
) -> Report:
    """Write the rows of a file with a prediction each."""
    reports.check_output(output, overwrite, data)
    from lotr.training.predict import predict as answer

    options: Any = {"task": task, "task_column": task_column, "text": text, "text2": text2, "model": model}
    sizes: Any = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    rows = answer(adapter, data, **options, **sizes, tick=partial(console.tick, "Predicting"))
    reports.write_rows(rows, output)
    line = f"{len(rows)} predictions are in {output}."
    return Report({"rows": len(rows), "output": str(output)}, [line])


@command(app, "plan", "Planning", settings=TrainSettings, panels=["Adapter"], loads_base=True)
def plan(
    model: Annotated[str, Argument(help="As --model of lotr train; only its config is read.")],
    dtype: Annotated[str, Option(help="Type of the numbers.")] = "float32",
    compress: Annotated[
        int | None, Option(min=1, help="Foretell the bytes of a bank of so many LoRAs.")
    ] = None,
    **options: Any,
) -> Report:
    """Show what would share what, and what it costs, before anything is trained. Needs no weights."""
    from lotr.training.planning import plan_model

    settings = TrainSettings(**read_options({**options, "model": model}))
    return reports.planned(model, *plan_model(settings, dtype, compress))


@command(app, "inspect", "Reading")
def inspect(
    adapter: Adapter,
    picture: Annotated[
        Path | None, Option(help="Heat map as PNG.", show_default="cores.png in the adapter's folder")
    ] = None,
) -> Report:
    """Show the groups of an adapter, and the norm and effective rank of every update."""
    from lotr.adapters.inspection import inspect as take_apart
    from lotr.adapters.plots import check_picture, draw
    from lotr.files.adapter_folder import read_adapter

    if picture is not None:
        check_picture(picture)
    folder = read_adapter(adapter)
    inspection = take_apart(folder.path)
    picture = picture or reports.beside(folder.path, "cores.png")
    if picture is not None:
        draw(inspection, picture)
    return reports.inspected(adapter, inspection, picture)


@command(app, "merge", "Merging", loads_base=True)
def merge(
    adapter: Adapter,
    output: Annotated[Path, Option(help="Folder for the merged model.")],
    model: Base = None,
    overwrite: Overwrite = False,
) -> Report:
    """Write a plain transformers model with the adapter merged into its weights."""
    from lotr.training.trained import merge as write_merged

    report = write_merged(adapter, output, model, overwrite)
    return Report(report, [f"The merged model is in {output}. It loads with transformers alone."])


@command(app, "export", "Exporting")
def export(
    adapter: Adapter,
    output: Annotated[Path, Option(help="Folder for the LoRA.")],
    pad_rank: Annotated[int | None, Option(min=1, help="Rank to bring all modules to, with zeros.")] = None,
    overwrite: Overwrite = False,
) -> Report:
    """Write an adapter as plain PEFT LoRA, exactly; it loads without this library."""
    from lotr.adapters.export import export as write_lora

    report = write_lora(adapter, output, overwrite, pad_rank)
    line = (
        f"A LoRA of rank {report['rank']} for {report['modules']} modules is in {output}: {report['numbers']:,} "
        f"numbers, {report['bytes']:,} bytes (the adapter has {report['bytes_before']:,})."
    )
    if report["peft_only"]:
        line += f" PEFT reads all of it; servers of LoRA do not take {len(report['peft_only'])} tensors."
    return Report(report, [line])


@command(app, "methods", "Listing")
def methods() -> Report:
    """List the methods of the table, with their papers."""
    return reports.methods()


command(app, "serve", "Loading", settings=ServeSettings, loads_base=True)(bank.serve)


def main() -> None:
    """Run the command line."""
    if sys.stdout is None:  # closed by the shell
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    app()
