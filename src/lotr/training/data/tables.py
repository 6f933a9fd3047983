"""Rows in columns of any names and values, as they were read, or as a task needs them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import DataError

if TYPE_CHECKING:
    import pyarrow

SHOWN = 20
#: Half of a pair, which JSON may hold, and which is no character.
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Rows in columns.

    Attributes:
        columns: Values by name, Python's or Arrow's.
        classes: Names of the classes, by column of ids, where a data set of the hub or a task declares them.
        name: What to call the rows in a message.
    """

    columns: Mapping[str, Any]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Table:
        """Take over rows, of which each may lack keys of others."""
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        return cls({name: [row.get(name) for row in rows] for name in names})

    @classmethod
    def from_arrow(cls, table: pyarrow.Table) -> Table:
        """Take over a table of Arrow, in whose metadata `datasets` keeps the names of classes."""
        content = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = content.get("info", {}).get("features", {})
        classes = {
            name: tuple(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
        return cls(dict(zip(table.column_names, table.columns, strict=True)), classes)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> Sequence[Any]:
        values = self.columns[name]
        return values.to_pylist() if hasattr(values, "to_pylist") else values

    def sample(self, name: str) -> Any:
        """Return the first value of a column that is not missing."""
        values = (value.as_py() if hasattr(value, "as_py") else value for value in self.columns[name])
        return next((value for value in values if value is not None), None)

    def find(self, name: str) -> str | None:
        """Return the column of a name, or else the only one that differs from it in capitals and spaces alone."""
        if name in self.columns:
            return name
        alike = [other for other in self.columns if other.strip().casefold() == name.strip().casefold()]
        return alike[0] if len(alike) == 1 else None

    def check(self, name: str, option: str) -> str:
        """Return the column of a name, or raise DataError; `option` is how the user names it."""
        column = self.find(name)
        if column is None:
            raise DataError(
                f'{self.name} has no column "{name}"; its columns are: {self.described()}. Name the right one with '
                f"{option}."
            )
        return column

    def described(self) -> str:
        """Return the names of the columns, with the keys of objects in them."""
        shown = []
        for name in itertools.islice(self.columns, SHOWN):
            value, kind = self.sample(name), "an object"
            if isinstance(value, list):
                value, kind = next(iter(value), None), "a list of objects"
            shown.append(f"{name} ({kind} with {', '.join(value)})" if isinstance(value, dict) else name)
        return ", ".join(shown) + f", … ({len(self.columns):,} in all)" * (len(self.columns) > SHOWN)

    def take(self, numbers: Sequence[int]) -> Table:
        """Return some of the rows."""
        columns = {
            name: values.take(numbers) if hasattr(values, "take") else [values[n] for n in numbers]
            for name, values in self.columns.items()
        }
        return Table(columns, self.classes, self.name)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows one by one."""
        columns = [self[name] for name in self.columns]
        return [dict(zip(self.columns, values, strict=True)) for values in zip(*columns, strict=True)]
