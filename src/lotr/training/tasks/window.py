"""The tasks that train, of which only a window is in memory: the others wait on disk with their moments."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ...bank.refusals import refused
from ...bank.task import Task

if TYPE_CHECKING:
    from ...bank import CoreBank
    from ...bank.cache import Slab
    from .row_adam import RowAdam

_SCHEMA = """
CREATE TABLE IF NOT EXISTS task (name TEXT PRIMARY KEY, tensors BLOB NOT NULL, in_bank INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS run (one INTEGER PRIMARY KEY CHECK (one = 1), content TEXT, tensors BLOB);
"""


class Window:
    """Tasks in training: those in the slab, and those that wait in a file.

    What leaves the slab goes into an open transaction that a checkpoint commits. A run that is killed therefore finds
    every task as it was at its last checkpoint, whether it was in memory then or not.

    Args:
        path: The file; made when it is not there.
        begin: Returns the task of a name as it is before its first step, with its labels and metadata.
    """

    def __init__(self, path: Path, begin: Callable[[str], Task]) -> None:
        self.begin = begin
        self.path = path
        self._file = sqlite3.connect(path, isolation_level=None)
        with refused(path):
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.executescript(_SCHEMA)
            self._file.execute("BEGIN IMMEDIATE")  # a second run on the same bank waits here, and is refused
        self._moments: dict[str, dict[str, Tensor]] = {}  # of tasks that were read and have no slot yet
        self._changed: set[str] = set()  # tasks in memory that the file has not as they are

    def attach(self, slab: Slab, optimizer: RowAdam) -> None:
        """Let a slab read from here, and spill to here."""
        self.slab, self.optimizer = slab, optimizer
        slab.source, slab.came, slab.leaves = self, self._came, self._leaves

    # ------------------------------------------------------------------ tasks come and go

    def read(self, names: Sequence[str]) -> tuple[Tensor, list[Task]]:
        """Return tasks as they are now, for the slab."""
        tasks = [self._waiting(name) or self.begin(name) for name in names]
        return torch.stack([task.numbers for task in tasks]), tasks

    def _waiting(self, name: str) -> Task | None:
        found = self._file.execute("SELECT tensors FROM task WHERE name = ?", (name,)).fetchone()
        if found is None:
            return None
        tensors = load(found[0])
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "moments": {}}
        for key, tensor in tensors.items():
            part, _, rest = key.partition("/")
            if rest:
                parts[part][rest] = tensor
        self._moments[name] = parts["moments"]
        return replace(self.begin(name), numbers=tensors["numbers"], head=parts["head"])

    def _came(self, name: str, slot: int) -> None:
        self.optimizer.set_moments(slot, self._moments.pop(name, {}))

    def _leaves(self, name: str, slot: int) -> None:
        if name in self._changed:
            self._write(name, slot)

    def _write(self, name: str, slot: int) -> None:
        heads = self.slab.heads
        tensors = {"numbers": self.slab.numbers[slot].detach().clone()}
        tensors |= {f"head/{key}": value for key, value in (heads.get(slot) if heads else {}).items()}
        tensors |= {f"moments/{key}": value for key, value in self.optimizer.moments(slot).items()}
        blob = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        with refused(self.path):
            self._file.execute("REPLACE INTO task VALUES (?, ?, 0)", (name, blob))
        self._changed.discard(name)

    def changed(self, names: Sequence[str]) -> None:
        """Note that a step is about to change tasks in memory."""
        self._changed.update(names)

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, bank: CoreBank, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Make everything up to here last, then bring the bank up to date; each is a transaction.

        Args:
            bank: The bank.
            content: What the run needs to go on, as JSON can hold it.
            tensors: The same, as tensors.
        """
        for name in sorted(self._changed):
            self._write(name, self.slab.slots[name])
        with refused(self.path):
            self._file.execute("REPLACE INTO run VALUES (1, ?, ?)", (json.dumps(content), save(tensors)))
            self._commit()
            # killed between the two, the bank is behind until the next checkpoint of the run that goes on
            bank.add_many(self._not_in_bank(), replace=True)
            self._file.execute("UPDATE task SET in_bank = 1 WHERE NOT in_bank")

    def _commit(self) -> None:
        self._file.execute("COMMIT")
        self._file.execute("BEGIN IMMEDIATE")

    def _not_in_bank(self) -> Iterator[Task]:
        for (name,) in self._file.execute("SELECT name FROM task WHERE NOT in_bank ORDER BY name").fetchall():
            task = self._waiting(name)
            self._moments.pop(name, None)
            assert task is not None
            yield task

    def last(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what the last checkpoint holds of the run, or nothing before the first one."""
        found = self._file.execute("SELECT content, tensors FROM run").fetchone()
        return None if found is None else (json.loads(found[0]), load(found[1]))

    def close(self) -> None:
        """Let go of the file; what came after the last checkpoint is gone."""
        if self._file.in_transaction:
            self._file.execute("ROLLBACK")
        self._file.close()
