"""The tasks in the file, as rows of plain values. No model and no tensor is known here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, UnknownTaskError, near
from .database import Database
from .row import Row

_NAME = "coalesce(CAST(name AS TEXT), '')"  # one changed byte makes it anything else
#: In the order of `Row`.
_COLUMNS = "name, dtype, created, error, about, numbers, head, checksum"


class TaskStore:
    """The tasks of a bank in one SQLite file.

    Args:
        path: The file.
        writable: Whether tasks will be written.
        truncated: Whether to open a file of which the end is missing.

    Raises:
        CheckpointError: The file is missing or damaged, or may not be read here.
    """

    def __init__(self, path: Path, writable: bool = False, truncated: bool = False) -> None:
        self.path = path
        self._file = Database(path, writable, truncated)

    @property
    def basis_hash(self) -> str:
        """Hash of the factors that the tasks belong to."""
        found = self._file.one("SELECT basis_hash FROM bank")
        return str(found[0]) if found else "none"

    @property
    def page_size(self) -> int:
        """Bytes of a page of the file."""
        return int(self._file.one("PRAGMA page_size")[0])

    @property
    def writable(self) -> bool:
        """Whether the file was opened for writing."""
        return self._file.writable

    def transaction(self) -> AbstractContextManager[Any]:
        """Write everything in a block, or nothing of it. See `Database.transaction`."""
        return self._file.transaction()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return int(self._file.one("SELECT count(*) FROM task")[0])

    def __contains__(self, name: object) -> bool:
        return self._place(name) is not None

    def names(self, after: str = "", limit: int = -1) -> list[str]:
        """Return names in the order of their characters, from the one behind `after` on; they are in the index."""
        sql = f"SELECT {_NAME} FROM task WHERE name > ? ORDER BY name LIMIT ?"
        return [name for (name,) in self._file.all(sql, (after, limit))]

    def places(self) -> list[tuple[int, str]]:
        """Return place and name of every task, in the order of their places; only the index is read."""
        return sorted(self._file.all(f"SELECT id, {_NAME} FROM task INDEXED BY task_name ORDER BY name"))

    def place(self, name: str) -> int:
        """Return the place of a task.

        Raises:
            UnknownTaskError: There is none of this name.
        """
        found = self._place(name)
        if found is None:
            raise self._unknown(name)
        return found

    def read(self, name: str) -> Row:
        """Return a task.

        Raises:
            UnknownTaskError: There is none of this name.
            CheckpointError: Its row is damaged.
        """
        found = (
            self._file.one(f"SELECT {_COLUMNS} FROM task WHERE name = ?", (name,), task=name)
            if _is_text(name)
            else None
        )
        if found is None:
            raise self._unknown(name)
        return self._whole(Row(*found), name)

    def read_at(self, place: int, name: str | None = None) -> Row:
        """Return the task at a place, whatever its name is if none is given.

        Raises:
            CheckpointError: Its row is damaged, or is that of another name.
        """
        found = self._file.one(f"SELECT {_COLUMNS} FROM task WHERE id = ?", (place,), task=name)
        if found is None:
            raise CheckpointError(f"Task {name!r} in {self.path} is gone: its name has no row.")
        return self._whole(Row(*found), name)

    def _whole(self, row: Row, name: str | None) -> Row:
        if name in (None, row.name) and row.is_whole:
            return row
        name = name or row.name
        raise CheckpointError(
            f"Task {name!r} in {self.path} is damaged: its checksum differs. The other tasks are not touched. Write it "
            "again with replace=True (`lotr bank add --replace`), or remove it."
        )

    def complaints(self) -> list[str]:
        """Return what SQLite finds wrong with the file itself, having read every page."""
        try:
            found = [str(said) for (said,) in self._file.all("PRAGMA integrity_check")]
        except CheckpointError as error:  # damaged so badly that it cannot be looked at
            found = [str(error)]
        return [] if found == ["ok"] else found

    def summary(self) -> tuple[int, dict[str, int], float]:
        """Return how many tasks there are, how many of each kind, and the largest error of rounding."""
        kind = "CASE WHEN json_valid(about) THEN json_extract(about, '$.task') END"
        error = (
            "CASE WHEN typeof(error) = 'real' THEN error ELSE 0.0 END"  # of a damaged row it can be anything
        )
        found = self._file.all(f"SELECT {kind}, count(*), max({error}) FROM task GROUP BY 1")
        kinds = {str(name or "unknown"): count for name, count, _ in found}
        return sum(kinds.values()), kinds, max((error for *_, error in found), default=0.0)

    # ------------------------------------------------------------------ writing, inside a transaction

    def write(self, row: Row, replace: bool = False) -> None:
        """Add a task, or put it in the place of the one of its name.

        Raises:
            ConfigError: The name is taken, and `replace` is not set.
        """
        place = self._place(row.name)
        if place is not None and not replace:
            raise self._taken(row.name, "replace it with replace=True (--replace)")
        # at its old place, where there is one
        sql = f"INSERT OR REPLACE INTO task (id, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._file.one(sql, (place, *astuple(row.sealed())))

    def remove_at(self, place: int) -> None:
        """Remove the task at a place, damaged or not."""
        self._file.one("DELETE FROM task WHERE id = ?", (place,))

    def rename(self, old: str, new: str) -> None:
        """Give a task another name.

        Raises:
            UnknownTaskError: There is no task `old`.
            ConfigError: There is a task `new`.
            CheckpointError: The row is damaged, and a new checksum would hide it.
        """
        row = self.read(old)
        if new in self:
            raise self._taken(new, "remove that one")
        checksum = row.sealed(new).checksum
        self._file.one("UPDATE task SET name = ?, checksum = ? WHERE name = ?", (new, checksum, old))

    def _place(self, name: object) -> int | None:
        found = self._file.one("SELECT id FROM task WHERE name = ?", (name,)) if _is_text(name) else None
        return None if found is None else int(found[0])

    def _taken(self, name: str, way_out: str) -> ConfigError:
        return ConfigError(
            f"The bank in {self.path.parent} has a task {name!r} already. Choose another name, or {way_out}."
        )

    def _unknown(self, name: str) -> UnknownTaskError:
        at = str(name).encode(errors="replace").decode()
        before = f"SELECT {_NAME} FROM task WHERE name < ? ORDER BY name DESC LIMIT 20"
        around = [found for (found,) in self._file.all(before, (at,))] + self.names(at, 20)
        hint = near(at, around)
        if hint.startswith("Known") and len(around) >= 20:  # not all of them
            hint = "`lotr bank list` shows its tasks."
        return UnknownTaskError(f"The bank in {self.path.parent} has no task {name!r}. {hint}")


def _is_text(name: object) -> bool:
    """Whether a name could be in the file; half a character could not."""
    return isinstance(name, str) and not any("\ud800" <= character <= "\udfff" for character in name)
