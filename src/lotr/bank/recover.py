"""Damaged banks: what is wrong with one, and what can still be read of it, put into a new bank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.adapter_folder import BASIS_WEIGHTS, CONFIG
from ..files.atomic import check_free, whole_folder
from .basis import BANK, TASKS, Basis, Description
from .head_form import head_form
from .store import TaskStore, create_store
from .task import to_task

Tick = Callable[[int, int], None]  # tasks done, tasks in all
_LEAF = 13  # first byte of a page that holds rows of a table


def verify(basis: Basis, store: TaskStore, tick: Tick | None = None) -> dict[str, Any]:
    """Read everything: the basis, every page of the file of tasks, and every task with its checksum.

    Args:
        basis: The basis of the bank.
        store: Its tasks.
        tick: Called as tasks are done.

    Returns:
        `ok`; `tasks`, how many there are; `damaged`, each with its name and the reason; `file`, what is wrong with the
        file itself; `basis`, what is wrong with the basis.
    """
    broken_basis: str | None = None
    damaged: list[dict[str, str]] = []
    tasks: list[tuple[int, str]] = []
    forms: dict[str, list[str]] = {}  # of heads → tasks
    try:
        basis.factors()
    except CheckpointError as error:
        broken_basis = str(error)
    file = store.complaints()
    try:
        tasks = store.ids()
    except CheckpointError as error:
        file.append(f"The names of the tasks cannot be read. {error}")
    for done, (number, name) in enumerate(tasks, start=1):
        try:
            head = to_task(store.read_id(number, name), basis.layout.size).head
            if head:
                forms.setdefault(head_form(head), []).append(name)
        except CheckpointError as error:
            damaged.append({"task": name, "reason": str(error)})
        if tick is not None:
            tick(done, len(tasks))
    usual = max(forms, key=lambda form: len(forms[form]), default="")
    for form, names in forms.items():
        reason = f"Its head is {form}, and those of most tasks are {usual}: it is of another base model. Remove it."
        damaged += [{"task": name, "reason": reason} for name in names if form != usual]
    ok = not (broken_basis or file or damaged)
    return {"ok": ok, "tasks": len(tasks), "damaged": damaged, "file": file, "basis": broken_basis}


def recover(path: Path, output: Path, tick: Tick | None = None) -> dict[str, Any]:
    """Save every task that can still be read; the damaged bank is not touched.

    Args:
        path: The damaged bank.
        output: Folder of the new bank.
        tick: Called as records are done.

    Returns:
        `saved`, how many tasks; `lost`, the names of the others, or `None` where the list of names is damaged too.

    Raises:
        ConfigError: The output folder is not free.
        CheckpointError: The description of the bank, or the first page of its file of tasks, is damaged.
    """
    check_free(output, overwrite=False)
    description = Description.read(path)
    source = TaskStore(path / TASKS, truncated=True)
    numbers = sorted({*row_numbers(path / TASKS), *row_numbers(path / f"{TASKS}-wal")})
    names: set[str] | None = None
    try:
        known = source.ids()
        names, numbers = {name for _, name in known}, [number for number, _ in known]
    except CheckpointError:
        pass  # then every number that a record may have is looked at
    with whole_folder(output) as folder:
        for name in (BANK, CONFIG, BASIS_WEIGHTS):
            shutil.copyfile(path / name, folder / name)
        create_store(folder / TASKS, description.basis_hash, description.task_bytes)
        saved = _copy(source, TaskStore(folder / TASKS, writable=True), numbers, tick)
    lost = None if names is None else sorted(names - saved)
    return {"saved": len(saved), "lost": lost, "output": str(output)}


def _copy(source: TaskStore, target: TaskStore, numbers: list[int], tick: Tick | None) -> set[str]:
    """Copy the records that are whole; returns their names."""
    saved: set[str] = set()
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
    return saved


def row_numbers(file: Path) -> Iterator[int]:
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
