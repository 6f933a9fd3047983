"""What every benchmark shares: options, what the record says of the machine, the table, the JSON file."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import lotr
from grids import Setting
from lotr.files.atomic import read_json, write_json
from peers import ADAPTERS, COMPILED, FLOOR, MKL, TEXT
from shapes import SHAPES
from timing import Spread

Row = dict[str, Any]
#: Measurements, and seconds of waiting for other programs: of a whole run, and of a short one.
ROUNDS, PATIENCE = {False: 9, True: 3}, {False: 300, True: 5}


def parser(what: str, name: str, pictured: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help="fewer sizes and rounds, for `make bench`")
    made.add_argument(
        "--rounds",
        type=int,
        help=f"measurements of everything; default {ROUNDS[False]}, short {ROUNDS[True]}",
    )
    made.add_argument(
        "--patience",
        type=float,
        help="seconds a setting for waiting until other programs rest; "
        f"default {PATIENCE[False]}, short {PATIENCE[True]}",
    )
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor; default: all")
    made.add_argument("--json", type=Path, default=Path("out") / f"{name}.json")
    if pictured:
        made.add_argument("--picture", type=Path, default=Path("out") / f"{name}.png")
    return made


def case_options(made: argparse.ArgumentParser) -> None:
    """Add the options that measure one model at one size instead of the grid."""
    made.add_argument("--shape", choices=SHAPES, help="one model instead of the grid")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--length", type=int, default=128, help="tokens of a row")
    names = [name for name in TEXT if "…" not in name]
    names += [method + how for how in (COMPILED, MKL) for method in ADAPTERS]
    names.append(FLOOR + COMPILED)
    made.add_argument(
        "--methods", nargs="+", choices=names, default=[*ADAPTERS], metavar="METHOD", help=", ".join(names)
    )
    made.add_argument("--ranks", nargs="+", type=int, default=[16])
    made.add_argument(
        "--resume",
        action="store_true",
        help="keep what the JSON file has of this machine, and measure the rest",
    )


def begin(options: argparse.Namespace) -> torch.device:
    """Set the threads and return where to compute."""
    options.rounds = options.rounds or ROUNDS[options.short]
    options.patience = PATIENCE[options.short] if options.patience is None else options.patience
    torch.set_num_threads(options.threads)
    calm()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


#: glibc gives freed memory back to the system and faults it in again, more or less of it by the order in which blocks
#: of all models happen to lie: up to a tenth of a step, and not of the method that happens to be running.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}


def keep_memory() -> None:
    """Start the program again, once, with an allocator that keeps what it has; for all methods alike."""
    if sys.platform == "linux" and not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def calm() -> None:
    """Silence what libraries say on every use."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def machine() -> dict[str, Any]:
    """Return what the times depend on beside the code."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "allocator": "keeps freed memory" if KEEP_MEMORY.keys() <= os.environ.keys() else "as it is",
        "numbers": "bfloat16" if torch.cuda.is_available() else "float32",
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, peft, transformers, lotr)},
        },
    }


def _processor() -> str:
    """Return name, family and model: virtual machines hide the generation from the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {told[key]}" for key in ("cpu family", "model") if key in told]
    return f"{told['model name']} ({', '.join(numbers)})" if numbers else told["model name"]


def command() -> str:
    """Return the command that is running, as one would type it in a checkout."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    shown = script.relative_to(root) if script.is_relative_to(root) else script
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def resumed(options: argparse.Namespace, settings: Sequence[Setting]) -> tuple[list[Row], list[Setting]]:
    """Return the rows that a run goes on from, and the settings of which there are none yet.

    Raises:
        SystemExit: The record to go on from is of another machine, or of other versions.
    """
    if not (options.resume and options.json.is_file()):
        return [], list(settings)
    record = read_json(options.json, "the record of a benchmark")
    if record["machine"] != machine():
        raise SystemExit(f"{options.json} was measured on {record['machine']}; this is {machine()}")
    rows: list[Row] = record["rows"]
    done = {(row["shape"], row["batch"], row["length"]) for row in rows}
    return rows, [one for one in settings if (one.shape, one.batch, one.length) not in done]


def write(path: Path, what: str, rows: Sequence[Row], **more: Any) -> None:
    """Write the record of a benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"what": what, "date": str(date.today()), "command": command(), "machine": machine()}
    write_json(path, {**said, **more, "rows": list(rows)})


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; all but the first columns are numbers, and equal values of the very first make a section."""
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(header):
        table.add_column(name, justify="left" if at < left else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def rounded(spread: Spread | None) -> dict[str, float] | None:
    """Return a spread for the record."""
    return spread and {name: float(f"{value:.4g}") for name, value in asdict(spread).items()}


def size(row: Row) -> str:
    """Return model and size of a row."""
    return f"{row['shape']} {row['batch']}×{row['length']}"


def ratio(spread: dict[str, float] | None) -> str:
    """Return a median and its quartiles."""
    return "" if spread is None else f"{spread['median']:.3f} ({spread['low']:.3f}–{spread['high']:.3f})"


def progress(text: str, total: int) -> Progress:
    """Return a bar on stderr that is advanced with `bar.advance(bar.task_ids[0])`."""
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(text, total=total)
    return bar
