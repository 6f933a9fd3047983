"""The tasks of a bank that are in memory, as the bank has them now; the least recently used make place."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .heads import Head
from .store import TaskStore
from .task import Record


@dataclass(frozen=True)
class LoadedTask:
    """What a batch needs of a task. It never changes, so a call that has it is not touched by what the cache does."""

    numbers: Tensor  # of its cores, where and in the type that the model needs them
    head: Head | None = None
    kind: str | None = None
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    cluster: int | None = None  # that `numbers` are of; without one they are all of the layout

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors."""
        return [self.numbers, *(self.head.parameters.values() if self.head is not None else ())]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.parameters)


class TaskCache:
    """The tasks in memory.

    Every look at it asks SQLite whether anything was committed since, by whichever handle or process; then a task is
    used only where its checksum is still the same. The connection of `store` is used for nothing else, so that it sees
    all commits.

    Attributes:
        capacity: Usual tasks that there is room for.
        hits, misses: How many tasks were in memory when they were looked for, and how many had to be read.
        training: Tasks that are being trained: they are as they are here, and leave on request alone.
    """

    def __init__(self, store: TaskStore, capacity: int | str, bytes_a_task: int) -> None:
        self.store, self._given, self._bytes_a_task = store, capacity, bytes_a_task
        self.in_bytes = isinstance(capacity, str)
        room = in_bytes(capacity) if isinstance(capacity, str) else capacity
        if room is None:
            raise ConfigError(
                f"capacity={capacity!r} is not understood. Use tasks (1000) or bytes ('256MB')."
            )
        self._room = room
        self.capacity = self._room // bytes_a_task if self.in_bytes else self._room
        if self.capacity < 1:
            raise ConfigError(
                f"capacity={capacity!r} holds no task; one needs {bytes_a_task:,} bytes. Use a larger number."
            )
        self.training: dict[str, LoadedTask] = {}
        # held while tasks are looked up, never while one is read or a model runs
        self._lock = threading.Lock()
        self._tasks: OrderedDict[str, tuple[LoadedTask, bytes, object]] = OrderedDict()
        self.used = self.hits = self.misses = 0

    def __reduce__(self) -> tuple[type[TaskCache], tuple[TaskStore, int | str, int]]:
        return TaskCache, (self.store, self._given, self._bytes_a_task)  # a copy begins empty

    def get(self, names: Sequence[str], load: Callable[[Record], LoadedTask]) -> Mapping[str, LoadedTask]:
        """Return tasks by names, each once, reading those that are not in memory; `load` makes a task of its record."""
        if self.training:
            return {name: self.training[name] for name in names}
        version = self.store.database.version
        with self._lock:
            known = {name: self._tasks[name] for name in names if name in self._tasks}
        stale = [name for name, (_, _, seen) in known.items() if seen != version]
        checksums = self.store.checksums(stale) if stale else {}
        tasks, room = {}, self._room
        for name in names:
            task, checksum, seen = known.get(name, (None, b"", None))
            if task is None or (seen != version and checksums.get(name) != checksum):
                self.misses += 1
                record = self.store.read(name)
                task, checksum = load(record), record.checksum
            else:
                self.hits += 1
            tasks[name] = task, checksum, version
            room -= self._cost(task)
            if room < 0:
                raise ConfigError(
                    f"A batch with {len(names)} tasks does not fit: capacity={self._given!r} is kept in memory, and "
                    f"task {name!r} takes {task.nbytes:,} bytes more. Raise the capacity, or make smaller batches."
                )
        with self._lock:
            for name, entry in tasks.items():
                if name in self._tasks:
                    self.used -= self._cost(self._tasks.pop(name)[0])
                self._tasks[name] = entry
                self.used += self._cost(entry[0])
            while self.used > self._room:
                self.used -= self._cost(self._tasks.popitem(last=False)[1][0])
        return {name: task for name, (task, *_) in tasks.items()}

    def clear(self) -> None:
        """Read every task anew when it is next used."""
        with self._lock:
            self._tasks.clear()
            self.used = 0

    def _cost(self, task: LoadedTask) -> int:
        return task.nbytes if self.in_bytes else 1


def in_bytes(text: str) -> int | None:
    """Read a size such as `256MB` or `1.5 GiB`; `None` where it is none.

    Example:
        >>> in_bytes("20kb"), in_bytes("1.5 KiB"), in_bytes("2M"), in_bytes("20")
        (20000, 1536, 2000000, None)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?=[KMGTB])([KMGT]?)(I?)B?", text.upper())
    if match is None:
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
