"""The tasks of a bank that are in memory: one row of numbers each, the least recently used out first."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from .heads import Heads
    from .task import Task

#: How a row without a task is written: PEFT's name, or `None`.
BASE = "__base__"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Source(Protocol):
    """Where tasks are read from."""

    def read(self, names: Sequence[str]) -> tuple[Tensor, list[Task]]:
        """Return the numbers `(n, size)` of tasks, and the tasks with their heads."""
        ...


class Slab:
    """Numbers of tasks in one preallocated tensor; slot 0 is all zeros, which is no task.

    A task is read when it is first used. With a full slab the least recently used one makes place.

    Args:
        source: The bank, or anything else with `read`.
        size: Numbers a task.
        capacity: Tasks in memory, at least those of one batch.
        dtype: Type of the numbers in memory.
        device: Where they are.
        heads: What is kept beside the numbers of a task.

    Attributes:
        numbers: Shape `(capacity + 1, size)`.
        slots: Task → its slot, the least recently used first.
        came: Called with name and slot when a task has been read.
        leaves: Called with name and slot before a task makes place.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        heads: Heads | None = None,
    ) -> None:
        self.source, self.capacity, self.heads = source, capacity, heads
        self.came: Callable[[str, int], None] | None = None
        self.leaves: Callable[[str, int], None] | None = None
        self.numbers = torch.zeros(capacity + 1, size, dtype=dtype, device=device)
        self.slots: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(capacity, 0, -1))

    def slots_of(self, names: Sequence[str | None]) -> list[int]:
        """Return the slot of each row's task, reading those that are not in memory.

        Args:
            names: A task a row, in any order; `None` or `"__base__"` for none.

        Raises:
            ConfigError: A batch has more tasks than the slab holds.
            CheckpointError: A task does not exist or is damaged. No task in memory is lost.
        """
        wanted = dict.fromkeys(name for name in names if name is not None and name != BASE)
        if len(wanted) > self.capacity:
            raise ConfigError(
                f"A batch with {len(wanted)} tasks does not fit: capacity={self.capacity} tasks are kept in memory. "
                "Raise the capacity, or make smaller batches."
            )
        missing = [name for name in wanted if name not in self.slots]
        if missing:
            self._load(missing, wanted)
        for name in wanted:
            self.slots.move_to_end(name)
        slots: dict[str | None, int] = {None: 0, BASE: 0, **{name: self.slots[name] for name in wanted}}
        return [slots[name] for name in names]

    def gather(self, slots: Tensor) -> Tensor:  # (rows,) -> (rows, size)
        """Return the numbers of the rows of a batch."""
        return take(self.numbers, slots)

    def forget(self, names: Sequence[str] | None = None) -> None:
        """Read tasks anew when they are next used, because they changed in the bank; default: all."""
        for name in list(self.slots) if names is None else names:
            if name in self.slots:
                self._free.append(self.slots.pop(name))

    def to(self, device: torch.device) -> None:
        """Move what is in memory, when the model has moved."""
        if self.numbers.device != device:
            self.numbers = self.numbers.to(device)
            if self.heads is not None:
                self.heads.to(device)

    @torch.no_grad()
    def _load(self, missing: Sequence[str], wanted: dict[str, None]) -> None:
        numbers, tasks = self.source.read(missing)
        if numbers.shape[1] != self.numbers.shape[1]:
            raise CheckpointError(
                f"Task {missing[0]!r} has {numbers.shape[1]} numbers, and a task of this basis has "
                f"{self.numbers.shape[1]}: it was made for another rank or other modules."
            )
        if self.heads is not None:
            for task in tasks:
                self.heads.check(task)
        for name, row, task in zip(missing, numbers, tasks, strict=True):
            slot = self._free.pop() if self._free else self._least_recent(wanted)
            self.numbers[slot] = row
            if self.heads is not None:
                self.heads.put(slot, task)
            self.slots[name] = slot
            if self.came is not None:
                self.came(name, slot)

    def _least_recent(self, wanted: dict[str, None]) -> int:
        name = next(name for name in self.slots if name not in wanted)
        if self.leaves is not None:
            self.leaves(name, self.slots[name])
        return self.slots.pop(name)


def take(table: Tensor, slots: Tensor) -> Tensor:  # (slots, size), (rows,) -> (rows, size)
    """Return rows of a table; a gradient reaches only the rows that were taken, and never slot 0."""
    return F.embedding(slots, table, padding_idx=0, sparse=table.requires_grad)


def tasks_in(capacity: int | str, bytes_a_task: int) -> int:
    """Return a capacity as a number of tasks.

    Args:
        capacity: Tasks, or bytes with a unit: `"256MB"`, `"1GiB"`.
        bytes_a_task: Bytes of one task in memory.

    Raises:
        ConfigError: It is neither, or holds no task.

    Example:
        >>> tasks_in("1MB", bytes_a_task=12_288)
        81
    """
    tasks = capacity
    if isinstance(capacity, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?i?)B", capacity)
        if found is None or found[2] not in _UNITS:
            raise ConfigError(
                f"capacity={capacity!r} is not understood. Use tasks (1000) or bytes ('256MB')."
            )
        tasks = int(float(found[1]) * _UNITS[found[2]]) // bytes_a_task
    if not isinstance(tasks, int) or tasks < 1:
        raise ConfigError(
            f"capacity={capacity!r} holds no task; one needs {bytes_a_task:,} bytes. Use a larger number."
        )
    return tasks
