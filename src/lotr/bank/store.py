"""`tasks.sqlite`: rows of plain values, in transactions. No model and no tensor is known here.

The file is in WAL mode with `synchronous=FULL`: readers go on while one process writes, and a commit that returned
is on the disk, so neither a killed process nor a power cut takes it back.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, UnknownTaskError, near
from .pages import page_size
from .refusals import refused

#: The head has a table of its own: rows of numbers are then of one length and fill their pages.
_SCHEMA = """
CREATE TABLE bank (basis_hash TEXT NOT NULL);
CREATE TABLE task (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, dtype TEXT NOT NULL, created REAL NOT NULL, error REAL NOT NULL,
    about TEXT NOT NULL, checksum BLOB NOT NULL, numbers BLOB NOT NULL
);
CREATE UNIQUE INDEX task_name ON task (name);
CREATE TABLE head (id INTEGER PRIMARY KEY REFERENCES task, tensors BLOB NOT NULL);
"""
_SELECT = """
SELECT task.name, dtype, created, error, about, numbers, coalesce(tensors, x''), checksum
FROM task LEFT JOIN head ON head.id = task.id
"""
_WAIT = 60.0  # seconds that a writer waits for another one


@dataclass(frozen=True)
class Row:
    """A task as it is kept.

    Args:
        name: Its name.
        dtype: Type of its numbers.
        created: When it was written, in seconds since 1970.
        error: What rounding to `dtype` cost, relative.
        about: JSON with everything that is no number.
        numbers: Its cores.
        head: Its head as a safetensors file; empty without one.
        checksum: Of all the above.
    """

    name: str
    dtype: str
    created: float
    error: float
    about: str
    numbers: bytes
    head: bytes
    checksum: bytes = b""

    def sealed(self) -> Row:
        """Return the row with its checksum."""
        return Row(*astuple(self)[:-1], checksum=self._sum())

    def _sum(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            plain = value if isinstance(value, bytes) else str(value).encode()
            digest.update(len(plain).to_bytes(8, "little") + plain)
        return digest.digest()

    @property
    def is_whole(self) -> bool:
        """Whether every byte is the one that was written."""
        return self.checksum == self._sum()


class TaskStore:
    """The tasks of a bank in one SQLite file.

    Args:
        path: The file.
        writable: Whether tasks will be written.

    Raises:
        CheckpointError: The file is missing or damaged, or may not be written.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path, self.writable = path, writable
        self._lock = threading.RLock()
        self._open()

    @staticmethod
    def create(path: Path, basis_hash: str, n_bytes: int) -> None:
        """Make an empty file.

        Args:
            path: The file, which is not there yet.
            basis_hash: Of the factors that the tasks belong to.
            n_bytes: Bytes of a task's numbers.
        """
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute(f"PRAGMA page_size = {page_size(n_bytes)}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        connection.execute("INSERT INTO bank VALUES (?)", (basis_hash,))
        connection.close()

    def _open(self) -> None:
        if not self.path.is_file():
            raise CheckpointError(
                f"{self.path.parent} holds no {self.path.name}: the tasks of the bank are gone."
            )
        mode = "rw" if self.writable else "ro"
        if not self.writable and not os.access(self.path.parent, os.W_OK):
            # a reader keeps its place in a file beside the database; where it cannot, nobody can be writing
            mode = "ro" if self.path.with_name(f"{self.path.name}-wal").exists() else "ro&immutable=1"
        with refused(self.path):
            uri = f"{self.path.resolve().as_uri()}?mode={mode}"
            self._connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=_WAIT, check_same_thread=False
            )
            self._process = os.getpid()
            if self.writable:
                self._connection.execute("PRAGMA synchronous = FULL")
            self.basis_hash: str = self._connection.execute("SELECT basis_hash FROM bank").fetchone()[0]

    def _run(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        if self._process != os.getpid():  # a connection must not be carried into a forked process
            self._open()
        return self._connection.execute(sql, values)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing of it.

        Raises:
            CheckpointError: The disk is full, the file is damaged, or another process has been writing for long.
        """
        if not self.writable:
            raise ConfigError(
                f"The bank in {self.path.parent} was opened for reading. Open it with writable=True."
            )
        with self._lock, refused(self.path):
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it already
                    self._run("ROLLBACK")
                raise

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        with self._lock, refused(self.path):
            return int(self._run("SELECT count(*) FROM task").fetchone()[0])

    def __contains__(self, name: object) -> bool:
        with self._lock, refused(self.path):
            return self._run("SELECT 1 FROM task WHERE name = ?", (name,)).fetchone() is not None

    def names(self, after: str = "", limit: int = -1) -> list[str]:
        """Return names in the order of their characters, from the one behind `after` on; they are in the index."""
        sql = "SELECT name FROM task WHERE name > ? ORDER BY name LIMIT ?"
        with self._lock, refused(self.path):
            return [name for (name,) in self._run(sql, (after, limit))]

    def read(self, name: str) -> Row:
        """Return a task.

        Raises:
            UnknownTaskError: There is none of this name.
            CheckpointError: Its row is damaged.
        """
        with self._lock, refused(self.path, name):
            found = self._run(f"{_SELECT} WHERE task.name = ?", (name,)).fetchone()
        if found is None:
            raise self._unknown(name)
        row = Row(*found)
        if not row.is_whole:
            raise CheckpointError(
                f"Task {name!r} in {self.path} is damaged: its checksum differs. The other tasks are not touched. Write "
                "it again with replace=True (`lotr bank add --replace`), or remove it."
            )
        return row

    def _unknown(self, name: str) -> UnknownTaskError:
        with self._lock, refused(self.path):
            before = self._run("SELECT name FROM task WHERE name < ? ORDER BY name DESC LIMIT 20", (name,))
            around = [found for (found,) in before] + self.names(name, 20)
        hint = near(name, around) if len(around) < 20 or "Near" in near(name, around) else ""
        return UnknownTaskError(
            f"The bank in {self.path.parent} has no task {name!r}. {hint or '`lotr bank list` shows its tasks.'}"
        )

    # ------------------------------------------------------------------ writing, inside a transaction

    def write(self, row: Row, replace: bool = False) -> None:
        """Add a task, or put it in the place of the one of its name.

        Raises:
            ConfigError: The name is taken, and `replace` is not set.
        """
        row = row.sealed()
        values = (row.dtype, row.created, row.error, row.about, row.checksum, row.numbers)
        old = self._id(row.name)
        if old is None:
            sql = "INSERT INTO task (name, dtype, created, error, about, checksum, numbers) VALUES (?, ?, ?, ?, ?, ?, ?)"
            at = self._run(sql, (row.name, *values)).lastrowid
        elif not replace:
            raise ConfigError(
                f"The bank in {self.path.parent} has a task {row.name!r} already. Choose another name, or replace it "
                "with replace=True (--replace)."
            )
        else:
            at = old
            sql = "UPDATE task SET dtype=?, created=?, error=?, about=?, checksum=?, numbers=? WHERE id=?"
            self._run(sql, (*values, at))
            self._run("DELETE FROM head WHERE id = ?", (at,))
        if row.head:
            self._run("INSERT INTO head VALUES (?, ?)", (at, row.head))

    def remove(self, name: str) -> None:
        """Remove a task, damaged or not.

        Raises:
            UnknownTaskError: There is none of this name.
        """
        at = self._id(name)
        if at is None:
            raise self._unknown(name)
        self._run("DELETE FROM head WHERE id = ?", (at,))
        self._run("DELETE FROM task WHERE id = ?", (at,))

    def rename(self, old: str, new: str) -> None:
        """Give a task another name.

        Raises:
            UnknownTaskError: There is no task `old`.
            ConfigError: There is a task `new`.
            CheckpointError: The row is damaged, and a new checksum would hide it.
        """
        row = self.read(old)
        if new in self:
            raise ConfigError(
                f"The bank in {self.path.parent} has a task {new!r} already. Choose another name, or remove that one."
            )
        sealed = Row(new, *astuple(row)[1:]).sealed()
        self._run("UPDATE task SET name = ?, checksum = ? WHERE name = ?", (new, sealed.checksum, old))

    def _id(self, name: str) -> int | None:
        found = self._run("SELECT id FROM task WHERE name = ?", (name,)).fetchone()
        return None if found is None else int(found[0])
