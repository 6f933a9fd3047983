"""Rows from files, saved folders, the Hugging Face hub and the built-in set, as `datasets.Dataset`.

Python's own modules parse CSV and JSON. The loaders of `datasets` shift or cut a first row that is too long, fill up
short rows, join rows at a stray quote, turn texts into dates, all without a word, and they write to a cache.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, near

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array, Table

BUILT_IN = "docstrings"


def read_splits(source: str) -> dict[str, Dataset]:
    """Read all splits of a data source; a file is one split, "train", and the values of a CSV file stay as written.

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .parquet), a folder written by `save_to_disk`, the word
            `docstrings`, or a set on the Hugging Face hub, `name` or `name/config`.

    Raises:
        DataError: The source is missing, damaged, empty or cannot be reached.

    Example:
        >>> read_splits("docstrings")["test"].column_names
        ['text', 'label', 'kind', 'module']
    """
    from datasets import Dataset

    path = Path(source).expanduser()
    if source == BUILT_IN:
        from .docstrings import load_docstrings

        return {name: Dataset.from_list(rows) for name, rows in load_docstrings().items()}
    if path.is_file():
        return {"train": Dataset(_read_file(path))}
    if path.is_dir():
        return _read_folder(path)
    is_path = source.startswith((".", "/", "~")) or path.suffix.lower() in READERS
    if not path.parent.is_dir() and is_path:
        raise DataError(f"There is no file {path}: its folder {path.parent} does not exist either.")
    if path.parent.is_dir() and (is_path or "/" in source or os.sep in source):
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
        raise DataError(f"There is no file {path}. {near(path.name, names)} (in {path.parent.resolve()})")
    return _read_hub(source)


def _read_folder(path: Path) -> dict[str, Dataset]:
    from datasets import load_from_disk

    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        hint = f"Name one of its files: {', '.join(files)}." if files else "Name a file."
        raise DataError(f"The folder {path} was not written by save_to_disk. {hint}")
    try:
        return _by_split(load_from_disk(str(path)))
    except Exception as error:  # damage shows as whatever Arrow, JSON or the file system say
        raise DataError(f"The folder {path} is damaged and cannot be loaded: {error}") from error


def _read_hub(source: str) -> dict[str, Dataset]:
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


def _by_split(loaded: Any) -> dict[str, Dataset]:
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}


def _read_file(path: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f'Cannot tell the format of {path} from its suffix "{path.suffix}". '
            f"Supported: {', '.join(READERS)}. Rename or convert the file."
        )
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8. Save the file as UTF-8.") from error
    if not table.num_rows:
        raise DataError(f"{path} has no rows{' under its header' * bool(table.num_columns)}.")
    return table


def _read_csv(path: Path) -> Table:
    import pyarrow

    text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    reader = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        lines = filter(None, reader)
        header = next(lines, [])
        rows = []
        for fields in lines:
            rows.append(fields)
            if len(fields) != len(header):
                raise csv.Error(f"{len(fields)} fields, but the header has {len(header)}")
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. A field with a quote, a line break or the separator "
            "in it must stand in double quotes; .jsonl needs no quoting."
        ) from error
    if len(set(header)) != len(header):
        raise DataError(f"{path} has two columns of one name; its header is: {', '.join(header)}.")
    if len(header) == 1 and ";" in header[0]:
        raise DataError(
            f"{path} separates its fields with semicolons. Save it with commas, or as .tsv with tabs."
        )
    values = zip(*rows, strict=True) if rows else [()] * len(header)
    return pyarrow.table(dict(zip(header, values, strict=True)))


def _read_json(path: Path) -> Table:
    import pyarrow

    text = path.read_bytes().decode("utf-8-sig")
    # not splitlines(): JSON strings may hold U+2028
    is_list = text.lstrip().startswith("[")
    rows: list[Any] = []
    for number, line in enumerate([text] if is_list else text.split("\n"), start=1):
        try:
            if line.strip():
                rows += json.loads(line) if is_list else [json.loads(line)]
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}). "
                "The file must have one object a line, or be one list of objects."
            ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: entry {number} is not an object. Each line must be one, such as "
                '{"text": "…", "label": "…"}.'
            )
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}
    return pyarrow.table({name: _as_array(values, name, path) for name, values in columns.items()})


def _as_array(values: Sequence[Any], name: str, path: Path) -> Array:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        row = next((n for n, value in enumerate(values, start=1) if type(value) is not type(values[0])), 1)
        raise DataError(f'Column "{name}" of {path} mixes types: {error} (row {row}).') from error


def _read_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet, types

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    # a pandas categorical is a dictionary, which older releases of datasets do not know
    fields = [f.with_type(f.type.value_type) if types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pyarrow.schema(fields, table.schema.metadata))


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
