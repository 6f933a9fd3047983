"""Pages that are made from the program when the site is built, so they cannot fall behind it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the command line and of the methods."""
    for name, content in {"command_line.md": command_line(), "methods.md": methods()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def command_line() -> str:
    """Return the help of every command, as typer itself writes it."""
    command = [sys.executable, "-m", "typer", "lotr_cli.app", "utils", "docs", "--name", "lotr"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.replace("# `lotr`", "# Command line", 1)


def methods() -> str:
    """Return the table of methods."""
    from lotr import METHODS

    lines = [
        "# Methods",
        "",
        "A published method is one row of a table over the same classes: the fields of `LotrConfig` that it sets.",
        "`LotrConfig(method=…)` and `lotr train --method …` take a name; fields set explicitly override the row.",
        "",
        "| method | what it is for | factors shared along | core | magnitude | start | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in METHODS.values():
        paper = f"[{row.title} ({row.year})]({row.url})"
        modes = ", ".join(row.modes)
        lines.append(
            f"| `{row.name}` | {row.purpose} | {modes} | {row.core} | {row.magnitude} | {row.start} | {paper} |"
        )
    return "\n".join(lines) + "\n"
