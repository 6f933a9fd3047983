"""The tasks of a bank in one SQLite file: records of plain values. No model and no tensor is known here.

The file is in WAL mode with `synchronous=FULL`: readers go on while one process writes, and a commit that returned is
on the disk, so neither a killed process nor a power cut takes it back. (`NORMAL` would do for a killed process.)
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, UnknownTaskError, near
from .task import Record

_SCHEMA = """
CREATE TABLE bank (basis_hash TEXT NOT NULL);
CREATE TABLE task (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, dtype TEXT NOT NULL, created REAL NOT NULL, error REAL NOT NULL,
    about TEXT NOT NULL, numbers BLOB NOT NULL, head BLOB NOT NULL, checksum BLOB NOT NULL
);
CREATE UNIQUE INDEX task_name ON task (name);
"""
_WAIT = 60.0  # seconds that a writer waits for another one
_LOG = 4 << 20  # bytes of the write-ahead log
_LARGE = 65536  # bytes of the largest page
_NAME = "coalesce(CAST(name AS TEXT), '')"  # one changed byte makes it anything else
_COLUMNS = "name, dtype, created, error, about, numbers, head, checksum"  # in the order of `Record`
_DAMAGED = (
    "is damaged: it was cut off, or bytes in it changed. Nothing was written. Restore the folder from a copy, or save "
    "every task that can still be read with `lotr bank recover`"
)
_IN_WORDS = {
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full. Nothing was written and nothing lost; make room and try again",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk fails, or is full. Nothing was lost; make room, or move "
    "the folder to another disk",
    sqlite3.SQLITE_BUSY: "is being written by another process, and has been for long. Nothing was written; try again",
    sqlite3.SQLITE_READONLY: "may not be written here. Nothing was written; give yourself the right to write in its "
    "folder, or copy the folder",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: it, or its folder, may not be read or written here. Give yourself the "
    "right, or copy the folder",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: "is no database, or its first bytes are damaged. Restore the folder from a copy, or save "
    "what can be read with `lotr bank recover`",
}


def create_store(path: Path, basis_hash: str, task_bytes: int) -> None:
    """Make an empty file.

    Args:
        path: The file, which is not there yet.
        basis_hash: Of the factors that the tasks belong to.
        task_bytes: Bytes of the numbers of one task.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    # large pages where tasks, with some 120 bytes beside their numbers, fill nine tenths of one; otherwise a task is a
    # chain of small pages, of which one end alone is unused
    connection.execute(f"PRAGMA page_size = {_LARGE if _LARGE % (task_bytes + 120) < _LARGE / 10 else 1024}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(_SCHEMA)
    connection.execute("INSERT INTO bank VALUES (?)", (basis_hash,))
    connection.close()


class TaskStore:
    """The tasks of a bank, over one connection that threads share and forked processes do not.

    Args:
        path: The file.
        writable: Whether tasks will be written.
        truncated: Whether to open a file of which the end is missing.

    Raises:
        CheckpointError: The file is missing or damaged, or may not be read here.
    """

    def __init__(self, path: Path, writable: bool = False, truncated: bool = False) -> None:
        self.path, self.writable, self.truncated = path, writable, truncated
        self._lock = threading.RLock()
        self._open()

    def _open(self) -> None:
        if not self.path.is_file():
            raise CheckpointError(f"{self.path.parent} holds no {self.path.name}: the bank's tasks are gone.")
        with self._in_words():
            uri = f"{self.path.resolve().as_uri()}?mode={self._mode()}"
            self._connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=_WAIT, check_same_thread=False
            )
            self._process = os.getpid()
            # a changed byte in one name must not keep the others from being listed
            self._connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            if self.truncated:  # else SQLite refuses to look at any of it
                self._connection.execute("PRAGMA writable_schema = ON")
            if self.writable:
                self._connection.execute("PRAGMA synchronous = FULL")
                # the log goes into the file when it is this long; SQLite counts in pages
                page = self._connection.execute("PRAGMA page_size").fetchone()[0]
                self._connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG // page}")
                self._connection.execute(f"PRAGMA journal_size_limit = {_LOG}")

    def _mode(self) -> str:
        if self.writable:
            return "rw"
        log = self.path.with_name(f"{self.path.name}-wal")
        unfinished = log.exists() and log.stat().st_size > 0
        # readers note beside the file what they read; where none can, nobody writes either
        return "ro" if unfinished or os.access(self.path.parent, os.W_OK) else "ro&immutable=1"

    @contextmanager
    def _in_words(self, task: str | None = None) -> Iterator[None]:
        """Turn SQLite's errors into this library's, which name the file, the task and the way out."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # a changed byte in the schema is met as a name that is no text
            damaged = (
                sqlite3.SQLITE_CORRUPT if isinstance(error, UnicodeDecodeError) else sqlite3.SQLITE_ERROR
            )
            code = getattr(error, "sqlite_errorcode", damaged) & 0xFF
            subject = f"Task {task!r} cannot be read: {self.path}" if task is not None else str(self.path)
            raise CheckpointError(f"{subject} {_IN_WORDS.get(code, 'cannot be used')} ({error}).") from error

    @contextmanager
    def _connected(self, task: str | None = None) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread."""
        with self._lock, self._in_words(task):
            if self._process != os.getpid():  # a connection must not be carried into a forked process
                self._open()
            yield self._connection

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing of it.

        Raises:
            ConfigError: The file was opened for reading.
            CheckpointError: The disk is full, the file is damaged, or another process has been writing for long.
        """
        if not self.writable:
            raise ConfigError(
                f"The bank in {self.path.parent} was opened for reading. Open it with writable=True."
            )
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: Any, task: str | None = None) -> list[Any]:
        with self._connected(task) as connection:
            return connection.execute(sql, values).fetchall()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    @property
    def basis_hash(self) -> str:
        """Hash of the factors that the tasks belong to."""
        rows = self._rows("SELECT basis_hash FROM bank")
        return str(rows[0][0]) if rows else "none"

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return int(self._rows("SELECT count(*) FROM task")[0][0])

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def names(self, after: str = "", limit: int = -1) -> list[str]:
        """Return names in the order of their characters, from the one behind `after` on; they are in the index."""
        sql = f"SELECT {_NAME} FROM task WHERE name > ? ORDER BY name LIMIT ?"
        return [name for (name,) in self._rows(sql, after, limit)]

    def ids(self) -> list[tuple[int, str]]:
        """Return number and name of every task, in the order of the numbers; only the index is read."""
        return sorted(self._rows(f"SELECT id, {_NAME} FROM task INDEXED BY task_name ORDER BY name"))

    def id_of(self, name: str) -> int:
        """Return the number of a task.

        Raises:
            UnknownTaskError: There is none of this name.
        """
        number = self._find(name)
        if number is None:
            raise self._unknown(name)
        return number

    def read(self, name: str) -> Record:
        """Return a task.

        Raises:
            UnknownTaskError: There is none of this name.
            CheckpointError: Its record is damaged.
        """
        sql = f"SELECT {_COLUMNS} FROM task WHERE name = ?"
        rows = self._rows(sql, name, task=name) if _is_text(name) else []
        if not rows:
            raise self._unknown(name)
        return self._whole(Record(*rows[0]), name)

    def read_id(self, number: int, name: str | None = None) -> Record:
        """Return the task of a number, whatever its name is if none is given.

        Raises:
            CheckpointError: Its record is damaged, or is that of another name.
        """
        rows = self._rows(f"SELECT {_COLUMNS} FROM task WHERE id = ?", number, task=name)
        if not rows:
            raise CheckpointError(f"Task {name!r} in {self.path} is gone: its name has no record.")
        return self._whole(Record(*rows[0]), name)

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

    def summary(self) -> tuple[int, dict[str, int], float]:
        """Return how many tasks there are, how many of each kind, and the largest error of rounding."""
        kind = "CASE WHEN json_valid(about) THEN json_extract(about, '$.task') END"
        error = "CASE WHEN typeof(error) = 'real' THEN error ELSE 0.0 END"  # a damaged one can be anything
        rows = self._rows(f"SELECT {kind}, count(*), max({error}) FROM task GROUP BY 1")
        kinds = {str(name or "unknown"): count for name, count, _ in rows}
        return sum(kinds.values()), kinds, max((error for *_, error in rows), default=0.0)

    # ------------------------------------------------------------------ writing, inside a transaction

    def write(self, record: Record, overwrite: bool = False) -> None:
        """Add a task, or put it in the place of the one of its name.

        Raises:
            ConfigError: The name is taken, and `overwrite` is not set.
        """
        number = self._find(record.name)
        if number is not None and not overwrite:
            raise self._taken(record.name, "replace it with replace=True (--replace)")
        sql = f"INSERT OR REPLACE INTO task (id, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._rows(sql, number, *astuple(record.sealed()))

    def remove_id(self, number: int) -> None:
        """Remove the task of a number, damaged or not."""
        self._rows("DELETE FROM task WHERE id = ?", number)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name.

        Raises:
            UnknownTaskError: There is no task `old`.
            ConfigError: There is a task `new`.
            CheckpointError: The record is damaged, and a new checksum would hide it.
        """
        record = self.read(old)
        if new in self:
            raise self._taken(new, "remove that one")
        checksum = replace(record, name=new).sealed().checksum
        self._rows("UPDATE task SET name = ?, checksum = ? WHERE name = ?", new, checksum, old)

    def _find(self, name: object) -> int | None:
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
