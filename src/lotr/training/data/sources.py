"""Where rows come from: files, saved folders, the hub and the built-in set, all as `datasets.Dataset`."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError, near
from .readers import READERS, by_column, in_memory, read_file

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = "docstrings"
SAVED_FOLDER_MARKS = ("dataset_dict.json", "state.json")


def read(source: str, split: str | None = None, strings: Collection[str] = ()) -> Dataset:
    """Read one split of a data source.

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .parquet), a folder written by `save_to_disk`, the word
            `docstrings` (see `lotr.training.data.docstrings`), or a set on the Hugging Face hub, `name` or
            `name/config`.
        split: Which split. Default: "train", or the only one there is; a file is one split, "train".
        strings: Columns of a CSV file that stay text even where all their values are numbers.

    Returns:
        At least one row.

    Raises:
        DataError: The source is missing, damaged, empty or cannot be reached.

    Example:
        >>> read("docstrings", split="test").column_names
        ['text', 'label', 'kind', 'module']
    """
    return choose_split(read_splits(source, strings), source, split)


def choose_split(splits: dict[str, Dataset], source: str, split: str | None = None) -> Dataset:
    """Return the split asked for; without a wish, "train" or the only one."""
    name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if name not in splits:
        raise DataError(
            f'{source} has no split "{name}". Its splits: {", ".join(splits)}. {near(name, splits)}'
        )
    if not len(splits[name]):
        raise DataError(f'Split "{name}" of {source} has no rows; there is nothing to read.')
    return splits[name]


def read_splits(source: str, strings: Collection[str] = ()) -> dict[str, Dataset]:
    """Read all splits of a source; arguments and errors are those of `read`."""
    path = Path(source).expanduser()
    if source == BUILT_IN:
        from .docstrings import load_docstrings

        return {name: in_memory(by_column(rows), source) for name, rows in load_docstrings().items()}
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return {"train": read_file(path, strings)}
    has_separator = "/" in source or os.sep in source
    if (
        path.suffix.lower() in READERS
        or source.startswith((".", "/", "~"))
        or (has_separator and path.parent.is_dir())
    ):
        raise DataError(_missing(path))
    return _hub(source)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no file {path}: its folder {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    return f"There is no file {path}. {near(path.name, names)} (in {path.parent.resolve()})"


def _folder(path: Path) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_from_disk

    if not any((path / mark).is_file() for mark in SAVED_FOLDER_MARKS):
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        hint = f"Name one of its files: {', '.join(files)}." if files else "Name a file."
        raise DataError(f"The folder {path} was not written by save_to_disk. {hint}")
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # damage shows as whatever Arrow, JSON or the file system say
        raise DataError(f"The folder {path} is damaged and cannot be loaded: {error}") from error
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


def _hub(source: str) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_dataset

    parts = source.split("/")
    # "a/b" may be owner and name or name and config; three parts leave no choice
    readings: list[tuple[str, ...]] = [(source,)] if len(parts) < 3 else []
    if len(parts) > 1:
        readings.append(("/".join(parts[:-1]), parts[-1]))
    refusals = []
    for reading in readings:
        try:
            loaded = load_dataset(*reading)
        except Exception as error:  # the hub's client raises the errors of four libraries
            refusals.append(f"{' '.join(reading)}: {str(error).strip() or type(error).__name__}")
            continue
        return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    raise DataError(
        f'"{source}" is no file or folder here, and the Hugging Face hub did not give it '
        f"({'; '.join(refusals)}). Check the name and the network, or name a file "
        f"({', '.join(READERS)}) or the built-in set {BUILT_IN}."
    )
