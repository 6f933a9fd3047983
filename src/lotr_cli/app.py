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
    **given: Any,
) -> None:
    """Fine-tune a model; writes the adapter, `metrics.json`, `curve.png` and a model card."""
    from .settings import build

    try:
        settings = build(given, config)
    except ValueError as error:
        raise console.usage_error(str(error)) from None
    named = {name for name, value in given.items() if value is not None}
    with reported(), console.stopwatch("Starting"):
        from lotr.training.resume import restore
        from lotr.training.run import train as run
        from lotr.training.trainer import is_main_process

        from .progress import TrainingProgress

        if settings.resume:
            settings = restore(settings, named)
        bar = TrainingProgress()
        try:
            report = run(settings, say=console.say, callbacks=[bar])
        finally:
            bar.close()
        main_process = is_main_process()
    if main_process:
        reports.trained(report, settings.output, json)


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
    with reported(), console.stopwatch("Loading"):
        from lotr.adapters import plots
        from lotr.training.predict import evaluate as measure
        from lotr.training.trained import load_trained

        if picture is not None and not picture.parent.is_dir():
            raise console.usage_error(f"--picture {picture}: the folder {picture.parent} does not exist.")
        trained = load_trained(adapter, model)
        trained.columns = trained.columns.named(text=text, text2=text2, label=label)
        with console.counting("Evaluating") as tick:
            scores = measure(trained, data, batch_size, tick)
        drawn = None
        if "confusion" in scores:
            import numpy as np

            drawn = picture or trained.adapter.path / "confusion.png"
            plots.confusion(np.array(scores["confusion"]), trained.labels, drawn)
    reports.evaluated(adapter, data, scores, list(trained.labels), drawn, json)


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
    from . import output as writing

    with reported(), console.stopwatch("Loading"):
        writing.check_output(output, overwrite, data)
        columns = {"text": text, "text2": text2}
        rows = _predicted(adapter, data, columns, model, task, task_column, batch_size, max_new_tokens)
        writing.write_rows(rows, output)
    reports.said(
        {"rows": len(rows), "output": str(output)}, f"{len(rows)} predictions are in {output}.", json
    )


def _predicted(
    place: str,
    data: str,
    columns: dict[str, str | None],
    model: str | None,
    task: str | None,
    task_column: str | None,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    from lotr.bank.folder import BANK

    if (Path(place) / BANK).is_file():
        from lotr.training.tasks.predict import predict as predict_rows
        from lotr.training.tasks.served import load_served

        bank = load_served(place, model)
        with console.counting("Predicting") as tick:
            return predict_rows(bank, data, task, task_column, columns, batch_size, max_new_tokens, tick)
    if task is not None or task_column is not None:
        raise console.usage_error(
            f"{place} is no bank, so it has no tasks. Leave out --task and --task-column."
        )
    from lotr.training import predict as adapter_answers
    from lotr.training.trained import load_trained

    adapter = load_trained(place, model)
    adapter.columns = adapter.columns.named(**columns)
    with console.counting("Predicting") as tick:
        return adapter_answers.predict(adapter, data, batch_size, max_new_tokens, tick)


@app.command(epilog=epilog("plan"))
@with_train_options("Adapter")
def plan(
    model: Annotated[str, typer.Argument(help="Local folder, hub id or `minilm`; only its config is read.")],
    dtype: Annotated[str, typer.Option(help="Type of the numbers.")] = "float32",
    json: Json = False,
    **given: Any,
) -> None:
    """Show what would share what, and what it costs, before anything is trained. Needs no weights."""
    with reported(), console.stopwatch("Planning"):
        from lotr.training.planning import plan_model

        from .settings import build

        report = plan_model(build({**given, "model": model}), dtype)
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
        from lotr.adapters.inspection import draw
        from lotr.adapters.inspection import inspect as take_apart
        from lotr.files.adapter_folder import read_adapter

        folder = read_adapter(adapter)
        found = take_apart(folder)
        drawn = picture or folder.path / "cores.png"
        draw(found, drawn)
    reports.inspected(adapter, found, drawn, json)


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
        from lotr.files.atomic import check_apart, check_free

        check_free(output, overwrite)
        check_apart(output, "adapter", adapter)
        check_apart(output, "base model", model)
        from lotr.adapters.export import merged
        from lotr.training.trained import load_trained

        trained = load_trained(adapter, model)
        merged(trained.model, trained.tokenizer, output, overwrite)
    reports.said(
        {"output": str(output)},
        f"The merged model is in {output}. It loads with transformers alone.",
        json,
    )


@app.command(epilog=epilog("export"))
def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder for the LoRA.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an adapter as plain PEFT LoRA, exactly; it loads without this library."""
    with reported(), console.stopwatch("Exporting"):
        from lotr.adapters.export import to_lora
        from lotr.files.adapter_folder import read_adapter

        report = to_lora(read_adapter(adapter), output, overwrite)
    reports.said(
        report,
        f"A LoRA of rank {report['rank']} for {report['modules']} modules is in {output}: {report['numbers']:,} "
        f"numbers, {report['bytes']:,} bytes (the adapter has {report['bytes_before']:,}).",
        json,
    )


@app.command(epilog=epilog("methods"))
def methods(json: Json = False) -> None:
    """List the methods of the table, with their papers."""
    with reported():
        from lotr.methods import METHODS
    reports.listed(METHODS, json)


def main() -> None:
    """Run the command line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    app()
