"""Tables from files: CSV, JSON, Parquet and plain text.

Python's own modules parse CSV and JSON. The loaders of `datasets` shift or cut a first row that is too long, fill up
short rows, join rows at a stray quote, turn texts into dates, all without a word, and they write to a cache.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from .tables import Table

SEPARATORS = (",", ";", "\t", "|")
#: One object a line, whatever the suffix.
OBJECTS = re.compile(r"\s*\{.*\}\s*\n\s*\{")
WRAPPERS = ("data", "rows", "examples", "train", "items", "instances")
QUOTES = (
    "A field with a quote, a line break or the separator in it must stand in double quotes, and a quote inside it "
    "twice; .jsonl needs no quoting."
)


def read_table(path: Path) -> Table:
    """Read a file whose suffix is one of `READERS`, or raise DataError; values of a CSV file stay as written."""
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
    except RecursionError as error:
        raise DataError(
            f"{path} nests lists or objects too deeply. It must be a list of flat objects."
        ) from error
    if not len(table):
        raise DataError(f"{path} has no rows{' under its header' * bool(table.columns)}.")
    return table


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what Excel calls Unicode text
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def _read_lines(path: Path) -> Table:
    return Table({"text": list(filter(None, map(str.strip, _read_text(path).split("\n"))))})


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(2**31 - 1)  # of every reader in this process; by default 128 KiB
    text = _read_text(path)
    first = text.partition("\n")[0].strip("\r")
    named = first[4:] if first.lower().startswith("sep=") and len(first) == 5 else None
    records = _records(path, text, named or _separator(text, "\t" if path.suffix.lower() == ".tsv" else ","))
    if named:
        next(records)
    header = [name.strip() for name in next(records, (0, []))[1]]
    rows = []
    for line, fields in records:
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}. {QUOTES}"
            )
        rows.append(fields)
    while len(header) > 1 and not header[-1] and not any(fields[len(header) - 1] for fields in rows):
        header.pop()  # of separators at the end of every line
    rows = [fields[: len(header)] for fields in rows]
    twice, times = Counter(header or [""]).most_common(1)[0]
    if times > 1:
        raise DataError(f'{path} has two columns of one name, "{twice}". Rename one of them.')
    return Table(dict(zip(header, zip(*rows, strict=True) if rows else [()] * len(header), strict=True)))


def _separator(text: str, usual: str) -> str:
    """Return what separates header and first row into equally many fields, most of all; else what is usual."""
    counts = {usual: 1}
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        sizes = [len(fields) for fields in itertools.islice(filter(None, reader), 2)]
        if len(set(sizes)) == 1:
            counts[separator] = sizes[0]
    return max(counts, key=counts.__getitem__)


def _records(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file that are not empty, each with the line where it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, lines {line} to {reader.line_num}: no CSV ({error}). {QUOTES}"
            ) from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _read_json(path: Path) -> Table:
    text = _read_text(path)
    if text.lstrip().startswith("[") or (path.suffix.lower() == ".json" and not OBJECTS.match(text)):
        return _table_of(_parsed(text, path), path)
    # not splitlines(): JSON strings may hold U+2028
    lines = enumerate(text.split("\n"), start=1)
    return _table_of([_parsed(line, path, number) for number, line in lines if line.strip()], path)


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}). The file must have "
            "one object a line, or be one list of objects."
        ) from error


def _table_of(content: Any, path: Path) -> Table:
    """Return a list of rows, an object of columns or one around the rows as a table."""
    if isinstance(content, dict):
        values = list(content.values())
        if values and all(isinstance(value, dict) for value in values):  # as pandas writes columns
            first = values[0].keys()
            if other := next((name for name, column in content.items() if column.keys() != first), None):
                raise DataError(f"{path}: column {other!r} has other rows than {next(iter(content))!r}.")
            content = {name: [column[row] for row in first] for name, column in content.items()}
            values = list(content.values())
        scalars = [
            isinstance(value, list) and not any(isinstance(v, dict) for v in value) for value in values
        ]
        if values and all(scalars) and len({len(value) for value in values}) == 1:
            return Table(content)
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), list)), [content])
    if not isinstance(content, list):
        raise DataError(f"{path} holds neither a list of objects nor an object of columns.")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: entry {number} is not an object. Each line must be one, such as "
                '{"text": "…", "label": "…"}.'
            )
    return Table.from_rows(content)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        return Table.from_arrow(parquet.read_table(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
