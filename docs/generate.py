"""Parts of pages that are made from the program when the site is built, so they cannot fall behind it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the page of the command line."""
    files.append(File.generated(config, "command_line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where a page asks for them."""
    for mark, table in {"<!-- methods -->": methods, "<!-- fields -->": fields}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


def fields() -> str:
    """Return the fields of `LotrConfig`, with what each says of itself."""
    from lotr import LotrConfig

    lines = [
        "Beside the fields that every configuration of PEFT has (`task_type` and others) it has these. Those without a "
        "default are filled from the row of `method`, or from the `basis`.",
        "",
        "| field | meaning |",
        "|---|---|",
    ]
    for field in dataclasses.fields(LotrConfig):
        if "help" in field.metadata and field.name in vars(LotrConfig)["__annotations__"]:
            has_default = field.default is not dataclasses.MISSING and field.default is not None
            default = f" Default: {field.default}." if has_default else ""
            lines.append(f"| `{field.name}` | {field.metadata['help']}{default} |")
    return "\n".join(lines)


def methods() -> str:
    """Return the table of methods: what each is for, and the fields that it sets."""
    from lotr import METHODS

    lines = ["| method | what it is for | sets |", "|---|---|---|"]
    for row in METHODS.values():
        sets = {"modes": ", ".join(row.modes) or "none", "core": row.core}
        defaults = {field.name: field.default for field in dataclasses.fields(row)}
        for name in ("blocks", "magnitude", "init", "trainable"):
            if getattr(row, name) != defaults[name]:
                sets[name] = getattr(row, name)
        values = "; ".join(f"{name} {value}" for name, value in sets.items())
        lines.append(f"| [`{row.name}`]({row.url}) | {row.purpose} | {values} |")
    return "\n".join(lines)


def command_line() -> str:
    """Return the help of every command, as typer itself writes it."""
    command = [sys.executable, "-m", "typer", "lotr_cli.app", "utils", "docs", "--name", "lotr"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.replace("# `lotr`", "# Command line", 1)
