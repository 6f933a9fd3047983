"""The tasks of a bank that are in memory: one row of numbers each, the least recently used out first."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .task import BASE, Task

if TYPE_CHECKING:
    from .bank import CoreBank
    from .heads import Heads

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Slab:
    """Numbers of tasks in one preallocated tensor; slot 0 is all zeros, which is no task.

    A task is read when it is first used. With a full slab the least recently used one makes place.

    Args:
        bank: Where tasks are read from.
        capacity: Tasks in memory, at least those of one batch.
        dtype: Type of the numbers in memory.
        device: Where they are.
        heads: What is kept beside the numbers of a task.

    Attributes:
        numbers: Shape `(capacity + 1, size)`.
        slots: Task → its slot, the least recently used first.
    """

    def __init__(
        self,
        bank: CoreBank,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        heads: Heads | None = None,
    ) -> None:
        self.bank, self.capacity, self.heads = bank, capacity, heads
        self.numbers = torch.zeros(capacity + 1, bank.layout.size, dtype=dtype, device=device)
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
        needed = dict.fromkeys(name for name in names if name is not None and name != BASE)
        if len(needed) > self.capacity:
            raise ConfigError(
                f"A batch with {len(needed)} tasks does not fit: capacity={self.capacity} tasks are kept in memory. "
                "Raise the capacity, or make smaller batches."
            )
        missing = [name for name in needed if name not in self.slots]
        if missing:
            self.put(self.bank.read(missing)[1], needed)
        for name in needed:
            self.slots.move_to_end(name)
        slots: dict[str | None, int] = {None: 0, BASE: 0, **{name: self.slots[name] for name in needed}}
        return [slots[name] for name in names]

    @torch.no_grad()
    def put(self, tasks: Sequence[Task], needed: dict[str, None]) -> None:
        """Write tasks that are not in memory into slots, none of which is that of a needed task."""
        if self.heads is not None:
            for task in tasks:
                self.heads.check(task)
        for task in tasks:
            slot = self._free.pop() if self._free else self._least_recent(needed)
            self.numbers[slot] = task.numbers
            if self.heads is not None:
                self.heads.put(slot, task)
            self.slots[task.name] = slot

    def _least_recent(self, needed: dict[str, None]) -> int:
        return self.slots.pop(next(name for name in self.slots if name not in needed))

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
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?i?)B", capacity)
        if match is None or match[2] not in _UNITS:
            raise ConfigError(
                f"capacity={capacity!r} is not understood. Use tasks (1000) or bytes ('256MB')."
            )
        tasks = int(float(match[1]) * _UNITS[match[2]]) // bytes_a_task
    if not isinstance(tasks, int) or tasks < 1:
        raise ConfigError(
            f"capacity={capacity!r} holds no task; one needs {bytes_a_task:,} bytes. Use a larger number."
        )
    return tasks
