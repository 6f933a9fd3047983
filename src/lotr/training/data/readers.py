"""One file of rows as a `datasets.Dataset`: .csv, .tsv, .json, .jsonl and .parquet.

Files are read into memory, past the cache of `datasets`: small sets are the rule here, and a run leaves
nothing behind in the user's home. What is wrong with a file is said with its line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# "007" is a name and stays one; 18 digits fit an int64
WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def read_file(path: Path, strings: Collection[str] = ()) -> Dataset:
    """Read a file; its suffix tells the format.

    A CSV column becomes whole or real numbers if all its values are written as such.

    Args:
        path: An existing file.
        strings: Columns of a CSV file that stay text even where all their values are numbers.

    Returns:
        At least one row, all in memory.

    Raises:
        DataError: The format is unknown, or the file is malformed or has no rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f'Cannot tell the format of {path} from its suffix "{path.suffix}". '
            f"Supported: {', '.join(READERS)}. Rename or convert the file."
        )
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    return reader(path, strings)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} cannot be read. Save the file as UTF-8."
        ) from error


def _csv(path: Path, strings: Collection[str], delimiter: str = ",") -> Dataset:
    # The csv module and not pandas: it knows the line, and it never takes the first of too many fields
    # for an index, which would shift every column of a file with an unquoted comma.
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    try:
        for fields in reader:
            if fields and not header:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise csv.Error(f"{len(fields)} fields, but the header has {len(header)}")
                rows.append(fields)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. A field with a quote, a line break or the separator "
            "in it must stand in double quotes; .jsonl needs no quoting."
        ) from error
    if not header:
        raise DataError(f"{path} is empty.")
    if len(set(header)) != len(header):
        raise DataError(f"{path} has two columns of one name; its header is: {', '.join(header)}.")
    if not rows:
        raise DataError(f"{path} has a header and no rows.")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    return in_memory({n: v if n in strings else _numbers(v) for n, v in columns.items()}, path)


def _numbers(values: list[str]) -> list[str] | list[int] | list[float]:
    if all(map(WHOLE.fullmatch, values)):
        return [int(value) for value in values]
    return [float(value) for value in values] if all(map(NUMBER.fullmatch, values)) else values


def _tsv(path: Path, strings: Collection[str]) -> Dataset:
    return _csv(path, strings, delimiter="\t")


def _json(path: Path, strings: Collection[str]) -> Dataset:
    text = _text(path)
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_json_value(text, path, 1) or (), start=1))
    else:
        # not splitlines(): JSON strings may hold U+2028
        lines = enumerate(text.split("\n"), start=1)
        numbered = [(number, _json_value(line, path, number)) for number, line in lines if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: entry {number} is not an object. Each line must be one, such as "
                '{"text": "…", "label": "…"}.'
            )
    if not numbered:
        raise DataError(f"{path} has no rows.")
    return in_memory(by_column(row for _, row in numbered), path)


def _json_value(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}). "
            "The file must have one object a line, or be one list of objects."
        ) from error


def _parquet(path: Path, strings: Collection[str]) -> Dataset:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    if not table.num_rows:
        raise DataError(f"{path} has no rows.")
    for index, field in enumerate(table.schema):
        # a pandas categorical, a type that datasets does not know
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
    return Dataset(table)


READERS: dict[str, Callable[[Path, Collection[str]], Dataset]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}


def by_column(rows: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def in_memory(columns: dict[str, list[Any]], source: Path | str) -> Dataset:
    import pyarrow
    from datasets import Dataset

    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            raise DataError(f'Column "{name}" of {source} mixes types: {error}.') from error
    return Dataset(pyarrow.table(arrays))
