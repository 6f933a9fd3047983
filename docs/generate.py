"""Pages that are made from the program when the site is built, so they cannot fall behind it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the command line, of the methods and of the configuration."""
    pages = {"command_line.md": command_line(), "methods.md": methods(), "configuration.md": configuration()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def configuration() -> str:
    """Return the fields of `LotrConfig`, with what each says of itself."""
    from lotr import LotrConfig

    lines = [
        "# Configuration",
        "",
        "The fields of `LotrConfig`, beside those that every configuration of PEFT has (`task_type` and others).",
        "Those without a default are filled from the row of `method`, or from the `basis`.",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
    ]
    for field in dataclasses.fields(LotrConfig):
        if "help" in field.metadata and field.name in vars(LotrConfig)["__annotations__"]:
            given = field.default is not dataclasses.MISSING and field.default is not None
            lines.append(
                f"| `{field.name}` | {f'`{field.default}`' if given else ''} | {field.metadata['help']} |"
            )
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """Return the help of every command, as typer itself writes it."""
    command = [sys.executable, "-m", "typer", "lotr_cli.app", "utils", "docs", "--name", "lotr"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.replace("# `lotr`", "# Command line", 1)


def methods() -> str:
    """Return the table of methods, and what each reached on real text."""
    from lotr import METHODS

    lines = [
        "# Methods",
        "",
        "A published method is one row of a table over the same classes: the fields of `LotrConfig` that it sets.",
        "`LotrConfig(method=…)` and `lotr train --method …` take a name; fields set explicitly override the row.",
        "[The formula](formula.md) says what the fields mean, [Adding a method](adding_a_method.md) how to add a row.",
        "",
        "| method | what it is for | factors shared along | core | blocks | magnitude | start | trains | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in METHODS.values():
        fields = (
            ", ".join(row.modes) or "nothing",
            row.core,
            row.blocks,
            row.magnitude,
            row.init,
            row.trainable,
        )
        paper = f"[{row.title} ({row.year})]({row.url})"
        lines.append(f"| `{row.name}` | {row.purpose} | {' | '.join(fields)} | {paper} |")
    return "\n".join([*lines, *results()]) + "\n"


def results() -> list[str]:
    """Return the table that `make bench-methods` measured."""
    found = json.loads((Path(__file__).parent / "data" / "methods.json").read_text(encoding="utf-8"))
    runs = [run for run in found["runs"] if run["epochs"] == 1]
    lines = [
        "",
        "## On real text",
        "",
        "The packaged MiniLM on `docstrings`, 16 classes, query and value, rank 16, one epoch, default settings of "
        f"every row, a cold head. Measured by `make bench-methods` on {found['date']}, {found['threads']} cores, "
        f"{len({run['seed'] for run in runs})} seed(s); 756 rows to evaluate on, so one score has a standard error of "
        "about 1.7 points. Trained numbers are without the head (6,160 more for each).",
        "",
        "| method | trained numbers | accuracy | seconds a step |",
        "|---|---:|---:|---:|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        score = statistics.mean(run["accuracy"] for run in mine)
        seconds = statistics.median(run["seconds_a_step"] for run in mine)
        lines.append(f"| `{method}` | {mine[0]['trained_numbers']:,} | {score:.4f} | {seconds:.3f} |")
    return [*lines, "", "![accuracy against trained numbers](images/methods.png)"]
