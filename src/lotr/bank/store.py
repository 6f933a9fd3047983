"""The tasks of a bank in one SQLite file: records of plain values. No model and no tensor is known here."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

from ..errors import CheckpointError, ConfigError, UnknownTaskError, near
from .database import Database
from .task import Record

_SCHEMA = """
CREATE TABLE bank (basis_hash TEXT NOT NULL);
CREATE TABLE task (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, dtype TEXT NOT NULL, created REAL NOT NULL, error REAL NOT NULL,
    about TEXT NOT NULL, numbers BLOB NOT NULL, head BLOB NOT NULL, checksum BLOB NOT NULL
);
CREATE UNIQUE INDEX task_name ON task (name);
"""
_DESCRIBE = "SELECT type, name, tbl_name, sql FROM sqlite_schema LIMIT 9"
_LARGE = 65536  # bytes of the largest page
_NAME = "coalesce(substr(CAST(name AS TEXT), 1, 999), '')"  # one changed byte makes it anything else
_COLUMNS = "name, dtype, created, error, about, numbers, head, checksum"  # in the order of `Record`


def create_store(path: Path, basis_hash: str, task_bytes: int) -> None:
    """Make an empty file for tasks whose numbers take `task_bytes`, on the factors of a hash."""
    connection = sqlite3.connect(path, isolation_level=None)
    # large pages where tasks, with some 120 bytes beside their numbers, fill nine tenths of one; otherwise a task is a
    # chain of small pages, of which one end alone is unused
    connection.execute(f"PRAGMA page_size = {_LARGE if _LARGE % (task_bytes + 120) < _LARGE / 10 else 1024}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(_SCHEMA)
    connection.execute("INSERT INTO bank VALUES (?)", (basis_hash,))
    connection.close()


@cache
def _tables() -> list[tuple[str, ...]]:
    """Return what SQLite tells of the tables of a bank."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA)
        return connection.execute(_DESCRIBE).fetchall()


class TaskStore:
    """The tasks of a bank, in a `Database` of these arguments; changes are made in a transaction of it.

    Raises:
        CheckpointError: The file is missing or damaged, or has other tables than a bank: SQL that somebody else put
            there (triggers, views, columns that are computed) would run with every statement.
    """

    def __init__(self, path: Path, writable: bool = False, truncated: bool = False) -> None:
        self.path = path
        self.database = Database(path, writable, truncated)
        self._rows = self.database.rows
        tables = self._rows(_DESCRIBE)
        odd = sorted({name for _, name, *_ in set(tables) ^ set(_tables())})
        if truncated:  # what is only read runs nothing, but a view in place of the table
            odd = [name for name in odd if name == "task"]
        if odd:
            self.database.close()
            raise CheckpointError(
                f"{path} is damaged, or was not made by this library: {odd[0][:80]!r} is not as in a bank. Nothing of "
                "it was run. Restore the folder from a copy, or save its tasks with `lotr bank recover`."
            )

    def check_basis(self, expected: str) -> None:
        """Refuse tasks that belong to other factors than those of a hash."""
        rows = self._rows("SELECT basis_hash FROM bank")
        own = str(rows[0][0]) if rows else "none"
        if own != expected:
            raise CheckpointError(
                f"The tasks in {self.path} belong to a basis with hash {own}, and bank.json tells of {expected}. The "
                "files were put together from different banks."
            )

    def __len__(self) -> int:
        return int(self._rows("SELECT count(id) FROM task")[0][0])  # count(*) could not be interrupted

    def __contains__(self, name: object) -> bool:
        return self._id(name) is not None

    def names(self, after: str = "", limit: int = -1) -> list[str]:
        """Return names in the order of their characters, from the one behind `after` on; they are in the index."""
        sql = f"SELECT {_NAME} FROM task WHERE name > ? AND typeof(name) = 'text' ORDER BY name LIMIT ?"
        names = [name for (name,) in self._rows(sql, after, limit)]
        # bytes that are no text have another order than what is shown
        if any("\ufffd" in name for name in names):
            shown = {name for (name,) in self._rows(sql, "", -1)}
            names = sorted(name for name in shown if name > after)[: limit if limit >= 0 else None]
        return names

    def ids(self) -> list[tuple[int, str]]:
        """Return number and name of every task, in the order of the numbers; only the index is read."""
        return sorted(self._rows(f"SELECT id, {_NAME} FROM task INDEXED BY task_name ORDER BY name"))

    def read(self, name: str) -> Record:
        """Return a task; CheckpointError where its record is damaged."""
        sql = f"SELECT {_COLUMNS} FROM task WHERE name = ?"
        rows = self._rows(sql, name, task=name) if _is_text(name) else []
        if not rows:
            raise self._unknown(name)
        return self._whole(Record(*rows[0]), name)

    def read_id(self, number: int, name: str | None = None) -> Record:
        """Return the task of a number, whatever its name is if none is given."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM task WHERE id = ?", number, task=name)
        if not rows:
            raise CheckpointError(f"Task {name!r} in {self.path} is gone: its name has no record.")
        return self._whole(Record(*rows[0]), name)

    def checksums(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the checksum of every task of these names that there is; equal ones are of equal records."""
        unknown = ", ".join("?" * len(names))
        return dict(self._rows(f"SELECT name, checksum FROM task WHERE name IN ({unknown})", *names))

    def with_head(self, other_than: str) -> Record | None:
        """Return the newest task with a head that has another name, where there is one."""
        sql = "SELECT id FROM task WHERE name != ? AND length(head) > 0 ORDER BY id DESC"
        for (number,) in self._rows(f"{sql} LIMIT 9", other_than):
            with suppress(CheckpointError):  # a damaged one tells nothing of the others
                return self.read_id(number)
        return None

    def _whole(self, record: Record, name: str | None) -> Record:
        if name in (None, record.name) and record.is_whole:
            return record
        raise CheckpointError(
            f"Task {name or record.name!r} in {self.path} is damaged: its checksum differs. The other tasks are not "
            "touched. Write it again with replace=True (`lotr bank add --replace`), or remove it."
        )

    def complaints(self) -> list[str]:
        """Return what SQLite finds wrong with the file itself, having read every page."""
        try:
            lines = [str(line) for (line,) in self._rows("PRAGMA integrity_check")]
        except CheckpointError as error:  # damaged so badly that it cannot be looked at
            lines = [str(error)]
        return [] if lines == ["ok"] else lines

    def summary(self) -> tuple[int, dict[str, int], int, float]:
        """Return how many tasks there are, how many of each kind, their bytes, and the largest error of rounding."""
        kind = "CASE WHEN json_valid(about) THEN substr(json_extract(about, '$.task'), 1, 40) END"
        error = "CASE WHEN typeof(error) = 'real' THEN error ELSE 0.0 END"  # a damaged one can be anything
        rows = self._rows(
            f"SELECT {kind}, count(*), total(length(numbers)), max({error}) FROM task GROUP BY 1"
        )
        kinds = {str(name or "unknown"): count for name, count, *_ in rows}
        worst = max((error for *_, error in rows), default=0.0)
        return sum(kinds.values()), kinds, int(sum(size for *_, size, _ in rows)), worst

    def write(self, record: Record, overwrite: bool = False) -> None:
        """Add a task, or put it in the place of the one of its name."""
        number = self._id(record.name)
        if number is not None and not overwrite:
            raise self._taken(record.name, "replace it with replace=True (--replace)")
        sql = f"INSERT OR REPLACE INTO task (id, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._rows(sql, number, *astuple(record.sealed()))

    def remove(self, name: str) -> None:
        """Remove a task, damaged or not."""
        number = self._id(name)
        if number is None:
            raise self._unknown(name)
        self._rows("DELETE FROM task WHERE id = ?", number)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name."""
        record = self.read(old)  # whole, or a new checksum would hide the damage
        if new in self:
            raise self._taken(new, "remove that one")
        checksum = replace(record, name=new).sealed().checksum
        self._rows("UPDATE task SET name = ?, checksum = ? WHERE name = ?", new, checksum, old)

    def _id(self, name: object) -> int | None:
        rows = self._rows("SELECT id FROM task WHERE name = ?", name) if _is_text(name) else []
        return int(rows[0][0]) if rows else None

    def _taken(self, name: str, way_out: str) -> ConfigError:
        return ConfigError(
            f"The bank in {self.path.parent} has a task {name!r} already. Choose another name, or {way_out}."
        )

    def _unknown(self, name: str) -> UnknownTaskError:
        text = str(name).encode(errors="replace").decode()
        before = f"SELECT {_NAME} FROM task WHERE name < ? ORDER BY name DESC LIMIT 20"
        around = [other for (other,) in self._rows(before, text)] + self.names(text, 20)
        hint = near(text, around)
        if hint.startswith("Known") and len(around) >= 20:  # not all of them
            hint = "`lotr bank list` shows its tasks."
        return UnknownTaskError(f"The bank in {self.path.parent} has no task {name!r}. {hint}")


def _is_text(name: object) -> bool:
    """Whether a name could be in the file; half a character could not."""
    return isinstance(name, str) and not any("\ud800" <= character <= "\udfff" for character in name)
