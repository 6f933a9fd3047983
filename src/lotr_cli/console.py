"""What the commands print and how they end: tables, JSON, progress, and one readable message an error."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lotr.errors import CheckpointError, ConfigError, Interrupted, LotrError, PlanError, TrainingError

# reports go to stdout; what happens meanwhile goes to stderr, so that --json can be piped
out, err = Console(), Console(stderr=True)

#: Set by the global option --debug.
debug = False

#: The sign that a command works: its name at first, then how much is done of what.
_bar = Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    console=err,
    transient=True,
)
_TASK = _bar.add_task("", total=None)
#: What the system, safetensors and SQLite say where a disk takes no more.
_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "disk is full", "disk I/O error")


@dataclass(frozen=True)
class Report:
    """What a command tells: its content as JSON, or else tables and lines; a failure where it is not `ok`."""

    content: Any
    shown: Sequence[Table | str]
    ok: bool = True

    def show(self, as_json: bool) -> None:
        """Print it on stdout, and end with 1 where it is not `ok`; CheckpointError where a disk or pipe takes none."""
        calm()
        try:
            if as_json:
                json.dump(self.content, sys.stdout, indent=2, default=str)
                sys.stdout.write("\n")
            for part in () if as_json else self.shown:
                # whole lines; names are data, so nothing in them is markup
                out.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
            sys.stdout.flush()
        except OSError as error:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - it is tried again when the program ends
            raise CheckpointError(f"The report cannot be written: {error.strerror or error}.") from None
        if not self.ok:
            raise typer.Exit(1)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table; numbers are flushed right."""
    result = Table(title=title or None, title_justify="left", header_style="bold")
    for at, name in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[at], int | float) for row in rows)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(_cell(value) for value in row))
    return result


def _cell(value: Any) -> Text:
    """Return a value as text in which nothing is markup: names are data."""
    if isinstance(value, dict):
        return Text("\n".join(f"{name}: {inner}" for name, inner in value.items()))
    if isinstance(value, list):
        return Text(", ".join(map(str, value)))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Text(str(value))
    return Text(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")


@contextmanager
def working(waiting: str) -> Iterator[None]:
    """Show that something is going on, until the report, and turn errors into one message and a code.

    The code is 2 for usage, 1 for failure, 130 for ctrl-C.
    """
    # of the processes that a launcher started, one says what all of them would
    speaks = os.environ.get("RANK", "0") == "0"
    _bar.reset(_TASK, total=None, description=f"{waiting} …")
    _bar.start()
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        if speaks:
            err.print("Stopped.", style="yellow")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not isinstance(error, LotrError) and any(word in str(error) for word in _FULL):
            error = CheckpointError(
                f"The disk is full, or may not be written ({error}). Nothing is left half-written: make room, and run "
                "the command again."
            )
        elif isinstance(error, OSError) and error.filename is not None:  # a place that the user named
            error = CheckpointError(
                f"{error.filename}: {error.strerror}. Check the path, and the rights on it."
            )
        known = isinstance(error, LotrError)
        # each process has rows and a device of its own, so those errors may be of one process alone
        if speaks or not known or isinstance(error, TrainingError):
            hint = "" if known or debug else "\nRun again as `lotr --debug …` to see where."
            err.print(f"[bold red]{'Error' if known else f'Unexpected {type(error).__name__}'}:[/] ", end="")
            err.print(f"{error}{hint}", markup=False, highlight=False, soft_wrap=True)
        usage = isinstance(error, ConfigError | PlanError)
        raise typer.Exit(130 if isinstance(error, Interrupted) else 2 if usage else 1) from None
    finally:
        calm()


def say(line: str) -> None:
    """Print a line for the user, not part of the report."""
    err.print(line, markup=False, highlight=False, style="dim", soft_wrap=True)


def calm() -> None:
    """Take the bar away, before a report is printed."""
    _bar.live.stop()


def tick(what: str, done: int, of: int) -> None:
    """Move the bar: what is done, how much of it, and how much there is."""
    _bar.update(_TASK, description=what, completed=done, total=of)
