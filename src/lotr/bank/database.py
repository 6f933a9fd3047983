"""The SQLite file under a bank: how it is made, opened and written.

It is in WAL mode with `synchronous=FULL`: readers go on while one process writes, and a commit that returned is on
the disk, so neither a killed process nor a power cut takes it back. (`NORMAL` would do for a killed process.)
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .refusals import refused

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


def create(path: Path, basis_hash: str, page_size: int) -> None:
    """Make an empty file.

    Args:
        path: The file, which is not there yet.
        basis_hash: Of the factors that the tasks belong to.
        page_size: Bytes of its pages; see `pages.page_size`.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {page_size}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(_SCHEMA)
    connection.execute("INSERT INTO bank VALUES (?)", (basis_hash,))
    connection.close()


class Database:
    """A connection that threads share and forked processes do not.

    Args:
        path: The file.
        writable: Whether it will be written.
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
        with refused(self.path):
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
                # the log goes into the file when it is this long; SQLite counts in pages, and these are large
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
    def statements(self, task: str | None = None) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread, and turn SQLite's errors into this library's.

        Args:
            task: The task that is read, for the message.

        Raises:
            CheckpointError: In the place of any error of SQLite.
        """
        with self._lock, refused(self.path, task):
            if self._process != os.getpid():  # a connection must not be carried into a forked process
                self._open()
            yield self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write everything in the block, or nothing of it.

        Raises:
            ConfigError: The file was opened for reading.
            CheckpointError: The disk is full, the file is damaged, or another process has been writing for long.
        """
        if not self.writable:
            raise ConfigError(
                f"The bank in {self.path.parent} was opened for reading. Open it with writable=True."
            )
        with self.statements() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise

    def one(self, sql: str, values: tuple[Any, ...] = (), task: str | None = None) -> Any:
        """Return the first row of an answer, or `None`."""
        with self.statements(task) as connection:
            return connection.execute(sql, values).fetchone()

    def all(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Return all rows of an answer."""
        with self.statements() as connection:
            return connection.execute(sql, values).fetchall()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()
