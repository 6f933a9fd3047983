"""An SQLite file over one connection that threads share and forked processes do not, and what its errors mean.

The file may come from someone else. So no statement takes more steps, and no value more bytes, than a file of its size
has work and room for, whatever its pages point to; `TaskStore` compares its tables.

The file is in WAL mode with `synchronous=FULL`: readers go on while one process writes, and a commit that returned is
on the disk, so neither a killed process nor a power cut takes it back. (`NORMAL` would do for a killed process.)
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

_WAIT = 60.0  # seconds that a writer waits for another one
_LOG = 4 << 20  # bytes of the write-ahead log
_STEPS = 2_000_000  # of SQLite's machine that any statement may take, and more for each byte of the file
_STEPS_A_BYTE = 4  # reading everything takes about one
_LONGEST = 1_000_000_000  # bytes of a row that is written; SQLite's own limit
_LOOK = 10_000  # steps between two looks at how many there were
_WAY_OUT = (
    "Restore the folder from a copy, or save every task that can still be read with `lotr bank recover`"
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
    sqlite3.SQLITE_CORRUPT: f"is damaged: it was cut off, or bytes in it changed. Nothing was written. {_WAY_OUT}",
    sqlite3.SQLITE_INTERRUPT: f"is damaged: reading it does not end, as its pages point to each other. {_WAY_OUT}",
    sqlite3.SQLITE_TOOBIG: f"is damaged: a row says that it is larger than the file. {_WAY_OUT}",
    sqlite3.SQLITE_NOTADB: f"is no database, or its first bytes are damaged. {_WAY_OUT}",
}


class Database:
    """A database that exists; `truncated` opens also a file of which the end is missing."""

    def __init__(self, path: Path, writable: bool = False, truncated: bool = False) -> None:
        self.path, self.writable, self.truncated = path, writable, truncated
        self._lock, self._opened = threading.RLock(), 0
        self._open()

    def _open(self) -> None:
        if not self.path.is_file():
            raise CheckpointError(f"{self.path.parent} holds no {self.path.name}: the bank's tasks are gone.")
        journal = self._beside("-journal")
        if journal.exists():  # SQLite would undo what it says, and delete the file that it names
            raise CheckpointError(
                f"{journal} belongs to no bank: {self.path.name} has a write-ahead log, and no rollback journal. If "
                "you trust the folder, remove the file."
            )
        with self._in_words():
            uri = f"{self.path.resolve().as_uri()}?mode={self._mode()}"
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=_WAIT, check_same_thread=False
            )
            self._connection, self._process, self._file = connection, os.getpid(), self.path.stat()
            self._opened, self._seen = self._opened + 1, self._look()
            connection.set_progress_handler(self._is_endless, _LOOK)
            self._set_limits()
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            # a changed byte in one name must not keep the others from being listed
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            if self.truncated:  # else SQLite refuses to look at any of it
                connection.execute("PRAGMA writable_schema = ON")
            if self.writable:
                connection.execute("PRAGMA journal_mode = WAL")  # it is, in every file of this library
                connection.execute("PRAGMA synchronous = FULL")
                # the log goes into the file when it is this long; SQLite counts in pages
                page = connection.execute("PRAGMA page_size").fetchone()[0]
                connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG // page}")
                connection.execute(f"PRAGMA journal_size_limit = {_LOG}")

    def _mode(self) -> str:
        if self.writable:
            return "rw"
        unfinished = _bytes(self._beside("-wal")) > 0
        # readers note beside the file what they read; where this one cannot, it reads as if nobody wrote
        return "ro" if unfinished or os.access(self.path.parent, os.W_OK) else "ro&immutable=1"

    def _look(self) -> tuple[int, ...] | None:
        """Return what tells that another user has written, where SQLite does not look."""
        if "immutable" not in self._mode():
            return None
        state = self.path.stat()
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _beside(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)

    def _set_limits(self) -> None:
        """Begin a statement: what it may take depends on the file as it is now."""
        size = _bytes(self.path) + _bytes(self._beside("-wal"))
        self._steps, self._most_steps = 0, _STEPS + _STEPS_A_BYTE * size
        if not self._connection.in_transaction:  # which may write what is larger than the file
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, size + _LOG)

    def _is_endless(self) -> bool:
        self._steps += _LOOK
        return self._steps > self._most_steps

    @contextmanager
    def _in_words(self, task: str | None = None) -> Iterator[None]:
        """Turn SQLite's errors into this library's, which name the file, the task and the way out."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # a changed byte in the schema is met as a name that is no text
            is_text = isinstance(error, UnicodeDecodeError)
            damaged = sqlite3.SQLITE_CORRUPT if is_text else sqlite3.SQLITE_ERROR
            code = getattr(error, "sqlite_errorcode", damaged) & 0xFF
            subject = f"Task {task!r} cannot be read: {self.path}" if task is not None else str(self.path)
            raise CheckpointError(f"{subject} {_IN_WORDS.get(code, 'cannot be used')} ({error}).") from error

    def __reduce__(self) -> tuple[type[Database], tuple[Path, bool, bool]]:
        return Database, (self.path, self.writable, self.truncated)

    @property
    def version(self) -> tuple[int, int, int]:
        """What is another one after every commit that this connection did not make."""
        committed = int(self.rows("PRAGMA data_version")[0][0])
        return os.getpid(), self._opened, committed

    @contextmanager
    def connected(self, task: str | None = None) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread."""
        with self._lock, self._in_words(task):
            if self._process != os.getpid():  # a connection must not be carried into a forked process
                self._open()
            # SQLite goes on with a file that has no name any more: reads would be old, writes lost
            if not (self.path.exists() and os.path.samestat(self._file, self.path.stat())):
                raise CheckpointError(
                    f"{self.path} was removed or replaced while the bank was open. Open the bank again, or restore "
                    "its folder from a copy."
                )
            if self._seen is not None and self._seen != self._look():
                self._connection.close()
                self._open()
            yield self._connection

    def rows(self, sql: str, *values: Any, task: str | None = None) -> list[Any]:
        """Run one statement; returns its rows. `task` is named where it fails."""
        with self.connected(task) as connection:
            self._set_limits()
            return connection.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing of it."""
        if not self.writable:
            raise ConfigError(
                f"The bank in {self.path.parent} was opened for reading. Open it with writable=True."
            )
        with self.connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
