"""What can still be read of a damaged file of tasks, put into a new bank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import BASIS_WEIGHTS, CONFIG
from ..files.atomic import whole_folder
from . import database
from .folder import BANK, TASKS, Description
from .row import Row
from .store import TaskStore

_LEAF = 13  # first byte of a page that holds rows of a table


def recover(path: Path, output: Path, tick: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Save every task that can still be read; the damaged bank is not touched.

    Args:
        path: The damaged bank.
        output: Folder of the new bank.
        tick: Called as rows are done.

    Returns:
        `saved`, how many tasks; `lost`, the names of the others, or `None` where the list of names is damaged too.

    Raises:
        ConfigError: The output folder is not free.
        CheckpointError: The description of the bank, or the first page of its file of tasks, is damaged.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not an empty folder. Choose another one for the new bank.")
    described = Description.read(path)
    source = TaskStore(path / TASKS, truncated=True)
    places = sorted(set(rows_in(path / TASKS)) | set(rows_in(path / f"{TASKS}-wal")))
    names: set[str] | None = None
    try:
        named = source.places()
        names, places = {name for _, name in named}, [place for place, _ in named]
    except CheckpointError:
        pass  # then every place where a row may be is looked at
    with whole_folder(output) as made:
        for name in (BANK, CONFIG, BASIS_WEIGHTS):
            shutil.copyfile(path / name, made / name)
        database.create(made / TASKS, described.basis_hash, source.page_size)
        saved = _copy(source, TaskStore(made / TASKS, writable=True), places, tick)
    return {
        "saved": len(saved),
        "lost": None if names is None else sorted(names - saved),
        "output": str(output),
    }


def _copy(
    source: TaskStore, target: TaskStore, places: list[int], tick: Callable[[int, int], None] | None
) -> set[str]:
    """Copy the rows that are whole; returns their names."""
    saved: set[str] = set()
    with target.transaction():
        for done, place in enumerate(places, start=1):
            row = _whole_row(source, place)
            if row is not None:
                target.write(row, replace=True)
                saved.add(row.name)
            if tick is not None:
                tick(done, len(places))
    target.close()
    return saved


def _whole_row(source: TaskStore, place: int) -> Row | None:
    try:
        return source.read_at(place)
    except CheckpointError:  # no row, or a damaged one
        return None


def rows_in(file: Path) -> Iterator[int]:
    """Yield the numbers of all rows on the pages of a database, or of its log; of other tables and of the past too.

    Source: https://www.sqlite.org/fileformat.html, sections 1.6 and 4.1

    Args:
        file: Database, or write-ahead log; nothing is yielded where it does not exist.
    """
    if not file.exists():
        return
    with file.open("rb") as stream:
        start = stream.read(32)
        log = start[:3] == b"\x37\x7f\x06"
        size = int.from_bytes(start[8:12] if log else start[16:18]) or 4096
        size = 65536 if size == 1 else size
        stream.seek(32 if log else 0)
        while page := stream.read(size + 24 if log else size)[24 if log else 0 :]:
            if page[0] == _LEAF and len(page) == size:
                for n in range(min(int.from_bytes(page[3:5]), size // 8)):
                    at = int.from_bytes(page[8 + 2 * n : 10 + 2 * n])
                    _, at = _varint(page, at)
                    yield _varint(page, at)[0]


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and where it ends."""
    value = 0
    for byte in page[at : at + 8]:
        value, at = value << 7 | byte & 127, at + 1
        if byte < 128:
            break
    return value, at
