"""`lotr`: the commands. Each is one call of the library; nothing heavy is imported before it runs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bank, console, reports
from .console import reported
from .examples import epilog
from .light import load
from .options import with_train_options

app = typer.Typer(
    name="lotr",
    help="Tensor-rank adapters: fine-tune, evaluate, inspect, merge and export. ΔW = σ·U·C·Vᵀ.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bank.app)

Adapter = Annotated[str, typer.Argument(help="Adapter folder or hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Base = Annotated[
    str | None, typer.Option("--model", help="Base model.", show_default="the one recorded in the adapter")
]
Data = Annotated[str, typer.Option("--data", help="Data: a file, folder, hub data set or `docstrings`.")]
Text = Annotated[
    str | None, typer.Option("--text", help="Column with the text.", show_default="as in training")
]
Text2 = Annotated[
    str | None, typer.Option("--text2", help="Column with the second text.", show_default="as in training")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("lotr"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Set what holds for every command."""
    console.debug = debug
    if not debug:  # what the libraries underneath plan to rename is no news for who runs a command
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


@app.command(epilog=epilog("train"))
@with_train_options()
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings.")] = None,
    json: Json = False,
    **options: Any,
) -> None:
    """Fine-tune a model; writes the adapter, `metrics.json`, `curve.png` and a model card."""
    with reported(), console.stopwatch("Starting"):
        options = load("lotr.training.settings").read_options(options, config)
        from lotr.training.process import is_main_process
        from lotr.training.run import train as run

        from .progress import training_progress

        with training_progress() as bar:
            report = run(say=console.say, callbacks=[bar], **options)
        if is_main_process():
            reports.trained(report, json)


@app.command(epilog=epilog("evaluate"))
def evaluate(
    adapter: Adapter,
    data: Data,
    text: Text = None,
    text2: Text2 = None,
    label: Annotated[
        str | None, typer.Option(help="Column with the label.", show_default="as in training")
    ] = None,
    model: Base = None,
    batch_size: BatchSize = 64,
    picture: Annotated[
        Path | None,
        typer.Option(help="Confusion matrix as PNG.", show_default="confusion.png in the adapter's folder"),
    ] = None,
    json: Json = False,
) -> None:
    """Measure an adapter on data; draws the confusion matrix."""
    if picture is None and Path(adapter).is_dir():
        picture = Path(adapter) / "confusion.png"
    with reported(), console.stopwatch("Loading"):
        from lotr.training.predict import evaluate as measure

        with console.counting("Evaluating") as tick:
            scores = measure(
                adapter,
                data,
                model=model,
                text=text,
                text2=text2,
                label=label,
                batch_size=batch_size,
                picture=picture,
                tick=tick,
            )
    reports.evaluated(adapter, data, scores, picture, json)


@app.command(epilog=epilog("predict"))
def predict(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, hub id, or bank.", show_default=False)],
    data: Data,
    output: Annotated[Path, typer.Option(help="File to write: .csv or .jsonl.")],
    task: Annotated[str | None, typer.Option(help="Of a bank: the task that answers all rows.")] = None,
    task_column: Annotated[
        str | None, typer.Option(help="Of a bank: column with the task that answers each row.")
    ] = None,
    text: Text = None,
    text2: Text2 = None,
    model: Base = None,
    batch_size: BatchSize = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a language model.")] = 64,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the rows of a file with a prediction each."""
    with reported(), console.stopwatch("Loading"):
        reports.check_output(output, overwrite, data)
        from lotr.training.predict import predict as answer

        with console.counting("Predicting") as tick:
            rows = answer(
                adapter,
                data,
                task=task,
                task_column=task_column,
                model=model,
                text=text,
                text2=text2,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                tick=tick,
            )
        reports.write_rows(rows, output)
    report = {"rows": len(rows), "output": str(output)}
    reports.said(report, f"{len(rows)} predictions are in {output}.", json)


@app.command(epilog=epilog("plan"))
@with_train_options("Adapter")
def plan(
    model: Annotated[str, typer.Argument(help="Local folder, hub id or `minilm`; only its config is read.")],
    dtype: Annotated[str, typer.Option(help="Type of the numbers.")] = "float32",
    json: Json = False,
    **options: Any,
) -> None:
    """Show what would share what, and what it costs, before anything is trained. Needs no weights."""
    with reported(), console.stopwatch("Planning"):
        from lotr.training.planning import plan_model
        from lotr.training.settings import TrainSettings, read_settings

        report = plan_model(read_settings(TrainSettings, {**options, "model": model}), dtype)
    reports.planned(model, report, json)


@app.command(epilog=epilog("inspect"))
def inspect(
    adapter: Adapter,
    picture: Annotated[
        Path | None, typer.Option(help="Heat map as PNG.", show_default="cores.png in the adapter's folder")
    ] = None,
    json: Json = False,
) -> None:
    """Show the groups of an adapter, and the norm and effective rank of every update."""
    with reported(), console.stopwatch("Reading"):
        from lotr.adapters.inspection import inspect as take_apart
        from lotr.adapters.plots import draw
        from lotr.files.adapter_folder import read_adapter

        folder = read_adapter(adapter)
        inspection = take_apart(folder.path)
        picture = picture or folder.path / "cores.png"
        draw(inspection, picture)
    reports.inspected(adapter, inspection, picture, json)


@app.command(epilog=epilog("merge"))
def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    model: Base = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a plain transformers model with the adapter merged into its weights."""
    with reported(), console.stopwatch("Merging"):
        from lotr.training.trained import merge as write_merged

        report = write_merged(adapter, output, model, overwrite)
    reports.said(report, f"The merged model is in {output}. It loads with transformers alone.", json)


@app.command(epilog=epilog("export"))
def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder for the LoRA.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an adapter as plain PEFT LoRA, exactly; it loads without this library."""
    with reported(), console.stopwatch("Exporting"):
        from lotr.adapters.export import export as write_lora

        report = write_lora(adapter, output, overwrite)
    reports.said(
        report,
        f"A LoRA of rank {report['rank']} for {report['modules']} modules is in {output}: {report['numbers']:,} "
        f"numbers, {report['bytes']:,} bytes (the adapter has {report['bytes_before']:,})."
        + (f" Servers of LoRA leave out {len(report['peft_only'])} tensors." if report["peft_only"] else ""),
        json,
    )


@app.command(epilog=epilog("methods"))
def methods(json: Json = False) -> None:
    """List the methods of the table, with their papers."""
    reports.listed(load("lotr.methods").METHODS, json)


def main() -> None:
    """Run the command line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    app()
