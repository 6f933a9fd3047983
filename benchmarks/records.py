"""What every benchmark shares: options, what its record says of the machine, tables, files, pages."""

from __future__ import annotations

import argparse
import json
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
from timing import Spread

Row = dict[str, Any]
ROUNDS = {False: 9, True: 3}  # measurements of a whole run, and of a short one

#: glibc gives freed memory back to the system and faults it in again, more or less of it by the order in which blocks
#: of all models happen to lie: up to a tenth of a step, and not of the method that happens to be running.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}


def parser(what: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks of time and memory have."""
    options = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="fewer models, methods and rounds")
    options.add_argument("--rounds", type=int, help=f"default {ROUNDS[False]}, short {ROUNDS[True]}")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all processors")
    options.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--json", type=Path, default=Path("out/bench") / f"{name}.json", help="the record")
    return options


def begin(options: argparse.Namespace) -> torch.device:
    """Set the threads and return where to compute."""
    options.rounds = options.rounds or ROUNDS[options.short]
    torch.set_num_threads(options.threads)
    calm()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for children and for what the record says, too
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here.")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_mb() -> float:
    """Return the peak of this process's memory in MiB; `ru_maxrss` is at least that of the process that began it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def keep_memory() -> None:
    """Start the program again, once, with an allocator that keeps what it has; for all methods alike."""
    if sys.platform == "linux" and not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def calm() -> None:
    """Silence what libraries say on every use."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def machine() -> dict[str, Any]:
    """Return what the times depend on beside the code."""
    on_cuda = torch.cuda.is_available()
    return {
        "processor": torch.cuda.get_device_name() if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "numbers": "bfloat16" if on_cuda else "float32",
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


def write(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """Write a record: date, command, machine, and a row a line."""
    script = Path(sys.argv[0]).name
    command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    head = {"date": str(date.today()), "command": command, "machine": machine(), **more}
    write_rows(path, head, "rows", rows)


def write_rows(path: Path, head: dict[str, Any], name: str, rows: Sequence[Row]) -> None:
    """Write JSON with a line a row."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["{", *lines, f' "{name}": [', body, " ]", "}"]) + "\n", encoding="utf-8")


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; all but the `left` first columns are numbers. With two of words, the first makes sections."""
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(header):
        table.add_column(name, justify="left" if at < left else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if left > 1 and before is not None and before[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return a table of Markdown; all but the first columns are numbers."""
    sides = ["---" if at < left else "---:" for at in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, sides, *rows)]


def fill(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands in a page between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: The page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{page} has no {start.strip()} … {end}")
    page.write_text("".join([before, start, "\n", "\n".join(lines), "\n\n", end, after]), encoding="utf-8")


def rounded(spread: Spread | None) -> dict[str, float] | None:
    """Return a spread for the record."""
    return spread and {name: float(f"{value:.4g}") for name, value in asdict(spread).items()}


def ratio(spread: dict[str, float] | None) -> str:
    """Return a median and its quartiles."""
    return "" if spread is None else f"{spread['median']:.3f} ({spread['low']:.3f}–{spread['high']:.3f})"


def progress(text: str, total: int | None) -> Progress:
    """Return a bar on stderr that is advanced with `bar.advance(bar.task_ids[0])`."""
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(text, total=total)
    return bar
