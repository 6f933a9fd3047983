"""Damaged banks: what is wrong with one, and what can still be read of it, put into a new bank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..files.adapter_folder import BANK, BASIS_WEIGHTS, CONFIG, AdapterFolder
from ..files.atomic import check_free, whole_folder
from ..tuner.saved_adapter import read_saved
from .basis import TASKS, Basis, Description
from .head_form import head_form
from .layout import Layout
from .store import TaskStore, create_store
from .task import to_task

T = TypeVar("T")
Tick = Callable[[int, int], None]  # tasks done, tasks in all
_LEAF = 13  # first byte of a page that holds rows of a table


def verify(path: Path, tick: Tick | None = None) -> dict[str, Any]:
    """Read everything of a bank that may not even open; see `CoreBank.verify`."""
    files: list[str] = []

    def judged(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except CheckpointError as error:
            files.extend({str(error)} - set(files))
            return None

    if not path.is_dir():
        Description.read(path)
    description, saved = judged(lambda: Description.read(path)), judged(lambda: read_saved(path))
    basis = judged(lambda: Basis(path)) if description and saved else None
    judged(basis.factors if basis else AdapterFolder(path, {}).tensors)
    # with other tables than a bank's, or without its end, the tasks in it may still be whole
    store = judged(lambda: TaskStore(path / TASKS))
    if store is None:
        store = judged(lambda: TaskStore(path / TASKS, truncated=True))
    tasks, damaged = 0, list[dict[str, str]]()
    if store is not None:
        if description is not None:
            judged(lambda: store.check_basis(description.basis_hash))
        files += store.complaints()
        names = judged(store.ids) or []
        tasks, damaged = len(names), _damaged(store, names, basis.layout if basis else None, tick)
        store.database.close()
    return {"ok": not (files or damaged), "tasks": tasks, "damaged": damaged, "files": files}


def _damaged(
    store: TaskStore, names: list[tuple[int, str]], layout: Layout | None, tick: Tick | None
) -> list[dict[str, str]]:
    """Return the damaged tasks, and the reasons; with the layout, also those that do not fit it."""
    damaged: list[dict[str, str]] = []
    forms: dict[str, list[str]] = {}  # of heads → tasks
    for done, (number, name) in enumerate(names, start=1):
        try:
            record = store.read_id(number, name)
            head = {} if layout is None else to_task(record, layout).head
            if head:
                forms.setdefault(head_form(head), []).append(name)
        except CheckpointError as error:
            damaged.append({"task": name, "reason": str(error)})
        if tick is not None:
            tick(done, len(names))
    usual = max(forms, key=lambda form: len(forms[form]), default="")
    for form, odd in forms.items():
        reason = f"Its head is {form}, and those of most tasks are {usual}: it is of another base model. Remove it."
        damaged += [{"task": name, "reason": reason} for name in odd if form != usual]
    return damaged


def recover(path: Path, output: Path, tick: Tick | None = None) -> dict[str, Any]:
    """Save every task that can still be read into a new bank; the damaged one is not touched.

    Returns `saved`, how many tasks, and `lost`, the names of the others; `None` where the list of names is damaged too.
    """
    check_free(output, overwrite=False)
    description = Description.read(path)
    source = TaskStore(path / TASKS, truncated=True)
    numbers = sorted({*row_numbers(path / TASKS), *row_numbers(path / f"{TASKS}-wal")})
    names: set[str] | None = None
    with suppress(CheckpointError):  # then every number that a record may have is looked at
        known = source.ids()
        names, numbers = {name for _, name in known}, [number for number, _ in known]
    with whole_folder(output) as folder:
        for name in (BANK, CONFIG, BASIS_WEIGHTS):
            shutil.copyfile(path / name, folder / name)
        create_store(folder / TASKS, description.basis_hash, description.bytes_of(description.numbers))
        target, saved = TaskStore(folder / TASKS, writable=True), set[str]()
        with target.database.transaction():
            for done, number in enumerate(numbers, start=1):
                record = None
                with suppress(CheckpointError):  # there is none of the number, or a damaged one
                    record = source.read_id(number)
                if record is not None:
                    target.write(record, overwrite=True)
                    saved.add(record.name)
                if tick is not None:
                    tick(done, len(numbers))
        target.database.close()
    lost = None if names is None else sorted(names - saved)
    return {"saved": len(saved), "lost": lost, "output": str(output)}


def row_numbers(file: Path) -> Iterator[int]:
    """Yield the numbers of all rows on the pages of a database, or of its log; of other tables and of the past too.

    Source: https://www.sqlite.org/fileformat.html, sections 1.6 and 4.1
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
                    offset = int.from_bytes(page[8 + 2 * n : 10 + 2 * n])
                    _, offset = _varint(page, offset)
                    yield _varint(page, offset)[0]


def _varint(page: bytes, offset: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and where it ends."""
    value = 0
    for byte in page[offset : offset + 8]:
        value, offset = value << 7 | byte & 127, offset + 1
        if byte < 128:
            break
    return value, offset
