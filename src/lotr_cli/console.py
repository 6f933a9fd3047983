"""What the commands print and how they end: tables, JSON, progress, and one readable message an error."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# reports go to stdout; what happens meanwhile goes to stderr, so that --json can be piped
out, err = Console(), Console(stderr=True)

#: Set by the global option --debug.
debug = False

_status: Any = None


@contextmanager
def reported() -> Iterator[None]:
    """Turn the library's errors into one message on stderr and an exit code: 2 for usage, 1 for failure."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        if _speaks():
            err.print("Stopped.", style="yellow")
        raise typer.Exit(130) from None
    except Exception as error:
        from lotr.errors import CheckpointError, ConfigError, Interrupted, LotrError, PlanError, TrainingError

        if debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename is not None:  # a place that the user named
            error = CheckpointError(
                f"{error.filename}: {error.strerror}. Check the path, and the rights on it."
            )
        known = isinstance(error, LotrError)
        name = "Error" if known else f"Unexpected {type(error).__name__}"
        hint = "" if known or debug else "\nRun again as `lotr --debug …` to see where."
        # each process has rows and a device of its own, so those errors may be of one process alone
        if _speaks() or not known or isinstance(error, TrainingError):
            err.print(f"[bold red]{name}:[/] ", end="")
            err.print(f"{error}{hint}", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, Interrupted):
            raise typer.Exit(130) from None
        raise typer.Exit(2 if isinstance(error, ConfigError | PlanError) else 1) from None


def _speaks() -> bool:
    """Whether this is the process, of those that a launcher started, that says what all of them would."""
    return os.environ.get("RANK", "0") == "0"


def usage_error(message: str) -> typer.Exit:
    """Print a message about how a command was called, and return the exit that ends it."""
    if _speaks():
        err.print("[bold red]Error:[/] ", end="")
        err.print(message, markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(2)


def say(line: str) -> None:
    """Print a line for the user, not part of the report."""
    err.print(line, markup=False, highlight=False, style="dim")


def print_line(line: str) -> None:
    """Print a line of a report on stdout, whole; names are data, so nothing in it is markup."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print a report as JSON on stdout."""
    json.dump(content, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout; numbers are flushed right."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for at, name in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[at], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    out.print(table)


def _cell(value: Any) -> Text:
    """Return a value as text in which nothing is markup: names are data."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Text(str(value))
    return Text(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")


@contextmanager
def stopwatch(what: str) -> Iterator[None]:
    """Show that something is going on until the first line or bar takes its place."""
    global _status
    _status = err.status(f"{what} …")
    _status.start()
    try:
        yield
    finally:
        calm()


def calm() -> None:
    """Take the sign of waiting away, before a bar is drawn."""
    global _status
    if _status is not None:
        _status.stop()
        _status = None


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that moves a bar: rows done, rows in all."""
    from rich.progress import Progress

    calm()
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that moves a bar whose name changes: what is done, how much of it, and how much there is."""
    from rich.progress import Progress

    calm()
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
