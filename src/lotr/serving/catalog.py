"""What the bank tells of its tasks now, without reading one again before anything was written."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..bank import CoreBank


@dataclass(frozen=True)
class Entry:
    """A task without its numbers.

    Args:
        name: Its name.
        kind: classification, regression or causal-lm.
        labels: Names of its classes.
        metadata: What its training recorded.
        created: When it was written, as text.
        checksum: Of all that is kept of it; another one after every change.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    metadata: dict[str, Any]
    created: str
    checksum: str


class Catalog:
    """Entries of tasks that were asked for lately, as the bank has them at the moment of the call.

    Args:
        bank: Where tasks are; other processes may write to it.
        default_kind: Of tasks that do not tell theirs.
        size: Entries kept in memory.
    """

    def __init__(self, bank: CoreBank, default_kind: str, size: int = 4096) -> None:
        self.bank, self.default_kind, self.size = bank, default_kind, size
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._version: object = None
        self._lock = threading.Lock()

    def get(self, name: str) -> Entry:
        """Return a task's entry.

        Raises:
            UnknownTaskError: There is none of this name.
            CheckpointError: It is damaged.
        """
        with self._lock:
            version = self.bank.store.version()  # before the read, so that an entry is never older than it
            if version != self._version:
                self._entries.clear()
                self._version = version
            entry = self._entries.get(name)
            self.hits, self.misses = self.hits + (entry is not None), self.misses + (entry is None)
            if entry is None:
                entry = self._entries[name] = self._read(name)
                if len(self._entries) > self.size:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(name)
            return entry

    def _read(self, name: str) -> Entry:
        about = self.bank.about(name)
        kind = about["task"] or self.default_kind
        labels = tuple(about["labels"])
        return Entry(name, kind, labels, about["metadata"], about["created"], about["checksum"])
