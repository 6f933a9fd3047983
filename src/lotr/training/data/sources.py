"""Rows from files, saved folders, the Hugging Face hub and the built-in set, as `datasets.Dataset`.

Python's own modules parse CSV and JSON. The loaders of `datasets` shift or cut a first row that is too long, fill up
short rows, join rows at a stray quote, turn texts into dates, all without a word, and they write to a cache.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, near

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

BUILT_IN = "docstrings"

# "007" is a name and stays one; 18 digits fit an int64
WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def read_splits(source: str, label: str | None = None) -> dict[str, Dataset]:
    """Read all splits of a data source; a file is one split, "train".

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .parquet), a folder written by `save_to_disk`, the word
            `docstrings` (see `lotr.training.data.docstrings`), or a set on the Hugging Face hub, `name` or
            `name/config`.
        label: Column of a CSV file that becomes numbers if all its values are. Other columns stay as written.

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
        return {"train": Dataset(_read_file(path, label))}
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
    from datasets import DatasetDict, load_from_disk

    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        hint = f"Name one of its files: {', '.join(files)}." if files else "Name a file."
        raise DataError(f"The folder {path} was not written by save_to_disk. {hint}")
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # damage shows as whatever Arrow, JSON or the file system say
        raise DataError(f"The folder {path} is damaged and cannot be loaded: {error}") from error
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


def _read_hub(source: str) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_dataset

    owner, _, last = source.rpartition("/")
    refusals = []
    # "a/b" may be owner and name or name and config
    for reading in [(source,), (owner, last)] if owner else [(source,)]:
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


def _read_file(path: Path, label: str | None) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f'Cannot tell the format of {path} from its suffix "{path.suffix}". '
            f"Supported: {', '.join(READERS)}. Rename or convert the file."
        )
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    try:
        table = reader(path, label)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8. Save the file as UTF-8.") from error
    if not table.num_rows:
        raise DataError(f"{path} has no rows.")
    return table


def _read_csv(path: Path, label: str | None) -> Table:
    text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    reader = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    rows: list[list[str]] = []
    try:
        for fields in filter(None, reader):
            rows.append(fields)
            if len(fields) != len(rows[0]):
                raise csv.Error(f"{len(fields)} fields, but the header has {len(rows[0])}")
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. A field with a quote, a line break or the separator "
            "in it must stand in double quotes; .jsonl needs no quoting."
        ) from error
    if len(rows) < 2:
        raise DataError(f"{path} has no rows{' under its header' * len(rows)}.")
    if len(set(rows[0])) != len(rows[0]):
        raise DataError(f"{path} has two columns of one name; its header is: {', '.join(rows[0])}.")
    if len(rows[0]) == 1 and ";" in rows[0][0]:
        raise DataError(
            f"{path} separates its fields with semicolons. Save it with commas, or as .tsv with tabs."
        )
    columns: dict[str, Sequence[Any]] = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    if label in columns:
        columns[label] = _as_numbers(columns[label])
    return _as_table(columns, path)


def _as_numbers(values: Sequence[str]) -> Sequence[str] | list[int] | list[float]:
    if all(map(WHOLE.fullmatch, values)):
        return [int(value) for value in values]
    return [float(value) for value in values] if all(map(NUMBER.fullmatch, values)) else values


def _read_json(path: Path, label: str | None) -> Table:
    text = path.read_bytes().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parse_json(text, path, 1), start=1))
    else:
        # not splitlines(): JSON strings may hold U+2028
        lines = enumerate(text.split("\n"), start=1)
        rows = [(number, _parse_json(line, path, number)) for number, line in lines if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: entry {number} is not an object. Each line must be one, such as "
                '{"text": "…", "label": "…"}.'
            )
    names = dict.fromkeys(name for _, row in rows for name in row)
    return _as_table({name: [row.get(name) for _, row in rows] for name in names}, path)


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}). "
            "The file must have one object a line, or be one list of objects."
        ) from error


def _as_table(columns: dict[str, Sequence[Any]], path: Path) -> Table:
    import pyarrow

    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            types = [type(value) for value in values]
            row = next((n for n, kind in enumerate(types, start=1) if kind is not types[0]), 1)
            raise DataError(f'Column "{name}" of {path} mixes types: {error} (row {row}).') from error
    return pyarrow.table(arrays)


def _read_parquet(path: Path, label: str | None) -> Table:
    import pyarrow
    from pyarrow import parquet, types

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    # a pandas categorical is a dictionary, which older releases of datasets do not know
    fields = [f.with_type(f.type.value_type) if types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pyarrow.schema(fields, table.schema.metadata))


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
