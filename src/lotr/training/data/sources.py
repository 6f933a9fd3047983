"""Rows from files, folders, the Hugging Face hub and the built-in set, as `datasets.Dataset`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import DataError, near
from .files import READERS, read_table
from .tables import Table

BUILT_IN = "docstrings"
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
SPLITS = ("train", "training", *HELD_OUT_SPLITS)


def read_splits(source: str) -> dict[str, Table]:
    """Read all splits of a data source; a file is one split, "train".

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .parquet, or .txt with a text a line), a folder with files of the
            names train, dev and test, or written by `save_to_disk`, the word `docstrings`, or a set on the Hugging
            Face hub, `name` or `name/config`.

    Raises:
        DataError: The source is missing, damaged, empty or cannot be reached.

    Example:
        >>> list(read_splits("docstrings")["test"].columns)
        ['text', 'label', 'kind', 'module']
    """
    path = Path(source).expanduser()
    if source == BUILT_IN:
        from .docstrings import load_docstrings

        return {name: Table.from_rows(rows) for name, rows in load_docstrings().items()}
    if os.path.isfile(path):  # noqa: PTH113 – pathlib raises for a long name
        return {"train": read_table(path)}
    if os.path.isdir(path):  # noqa: PTH112
        return _read_folder(path)
    here = os.path.isdir(path.parent)  # noqa: PTH112
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")] if here else []
    # with a suffix, what is nearly the name of a file is one; asking the hub for it would take its retries
    mistyped = bool(path.suffix and get_close_matches(path.name, names, cutoff=0.75))
    is_path = source.startswith((".", "/", "~")) or path.suffix.lower() in READERS or mistyped
    if not here and is_path:
        raise DataError(f"There is no file {path}: its folder {path.parent} does not exist either.")
    if here and (is_path or "/" in source or os.sep in source):
        raise DataError(f"There is no file {path}. {near(path.name, names)} (in {path.parent.resolve()})")
    return _read_hub(source)


def _read_folder(path: Path) -> dict[str, Table]:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            return _by_split(load_from_disk(str(path)))
        except Exception as error:  # damage shows as whatever Arrow, JSON or the file system say
            raise DataError(f"The folder {path} is damaged and cannot be loaded: {error}") from error
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    splits: dict[str, Path] = {}
    for file in files:
        name = re.split(r"[-_.]", file.stem.lower())[0]
        if name in SPLITS:
            if name in splits:
                raise DataError(
                    f"The folder {path} has two files for its split {name}, {splits[name].name} and {file.name}. "
                    "Name one of its files."
                )
            splits[name] = file
    if not splits:
        hint = (
            f"Name one of its files: {', '.join(file.name for file in files)}." if files else "Name a file."
        )
        raise DataError(
            f"The folder {path} was not written by save_to_disk, and no file is called train, dev or test. {hint}"
        )
    return {"train" if name == "training" else name: read_table(file) for name, file in splits.items()}


def _read_hub(source: str) -> dict[str, Table]:
    from datasets import load_dataset

    owner, _, last = source.rpartition("/")
    refusals = []
    # "a/b" may be owner and name or name and config
    for reading in [(source,), (owner, last)] if owner else [(source,)]:
        try:
            return _by_split(load_dataset(*reading))
        except Exception as error:  # the hub's client raises the errors of four libraries
            refusals.append(f"{' '.join(reading)}: {str(error).strip() or type(error).__name__}")
    raise DataError(
        f'"{source}" is no file or folder here, and the Hugging Face hub did not give it '
        f"({'; '.join(refusals)}). Check the name and the network, or name a file "
        f"({', '.join(READERS)}) or the built-in set {BUILT_IN}."
    )


def _by_split(loaded: Any) -> dict[str, Table]:
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {name: Table.from_arrow(rows.with_format("arrow")[:]) for name, rows in splits.items()}
