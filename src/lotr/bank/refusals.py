"""What SQLite says when it cannot go on, in words that name the file, the task and the way out."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

_DAMAGED = (
    "is damaged: it was cut off, or bytes in it changed. Nothing was written. Restore the folder from a copy, or save "
    "every task that can still be read with `lotr bank recover`"
)
_SAYS = {
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


@contextmanager
def refused(path: Path, task: str | None = None) -> Iterator[None]:
    """Turn SQLite's errors into this library's.

    Args:
        path: The database.
        task: The task that is being read, where it is one.

    Raises:
        CheckpointError: In the place of any error of SQLite.
    """
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # a changed byte in the schema is met as a name that is no text
        damaged = sqlite3.SQLITE_CORRUPT if isinstance(error, UnicodeDecodeError) else sqlite3.SQLITE_ERROR
        code = getattr(error, "sqlite_errorcode", damaged) & 0xFF
        says = _SAYS.get(code, "cannot be used")
        who = f"Task {task!r} cannot be read: {path}" if task is not None else str(path)
        raise CheckpointError(f"{who} {says} ({error}).") from error
