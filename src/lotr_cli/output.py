"""Writing rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


def check_output(path: Path, overwrite: bool, data: str) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        ConfigError: The type is not known, the file exists or is the data, or its folder does not exist.
    """
    from lotr.errors import ConfigError

    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"--output {path} has no known type. Name a .csv or .jsonl file.")
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise ConfigError(f"--output {path} is the data. Choose another name.")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists. Choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: the folder {path.parent} does not exist. Make it first.")


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    temporary.replace(path)
