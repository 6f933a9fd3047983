"""What a bank tells of itself: one task, all of it, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .folder import TASKS
from .record import to_tasks

if TYPE_CHECKING:
    from .bank import CoreBank

Tick = Callable[[int, int], None]  # tasks done, tasks in all


def about(bank: CoreBank, name: str) -> dict[str, Any]:
    """Return what is known of a task, as plain values.

    Raises:
        UnknownTaskError: There is none of this name.
        CheckpointError: It is damaged.
    """
    row = bank.store.read(name)
    _, (task,) = to_tasks([row], bank.layout)
    return {
        "name": task.name,
        "task": task.task,
        "labels": list(task.labels),
        "created": _time(row.created),
        "dtype": row.dtype,
        "numbers": task.numbers.numel(),
        "bytes": len(row.numbers),
        "rounding_error": row.error,
        "norm": float(task.numbers.norm()),
        "head": {key: list(tensor.shape) for key, tensor in task.head.items()},
        "head_bytes": len(row.head),
        "checksum": row.checksum.hex(),
        "metadata": dict(task.metadata),
    }


def overview(bank: CoreBank, after: str = "", limit: int = -1) -> list[dict[str, Any]]:
    """Return name, kind, number of classes and time of tasks, in the order of their names.

    Args:
        bank: The bank.
        after: Begin behind this name.
        limit: How many tasks at most; all of them by default.
    """
    found: list[dict[str, Any]] = []
    for name in bank.store.names(after, limit):
        try:
            row = bank.store.read(name)
        except CheckpointError:
            found.append({"name": name, "kind": "damaged", "classes": "", "created": ""})
            continue
        said = json.loads(row.about)
        kind, classes = said.get("task", ""), len(said.get("labels", ())) or ""
        found.append({"name": name, "kind": kind, "classes": classes, "created": _time(row.created)})
    return found


def stats(bank: CoreBank) -> dict[str, Any]:
    """Return counts and bytes of a bank, as plain values; reads every row once for the errors of rounding."""
    tasks, kinds, worst = bank.store.summary()
    files = [bank.path / f"{TASKS}{end}" for end in ("", "-wal")]
    file_bytes = sum(file.stat().st_size for file in files if file.exists())
    numbers = tasks * bank.task_bytes
    return {
        "tasks": tasks,
        "kinds": kinds,
        "base_model": bank.base_model,
        "dtype": bank.dtype,
        "numbers_per_task": bank.layout.size,
        "bytes_per_task": bank.task_bytes,
        "bytes_of_numbers": numbers,
        "bytes_of_tasks": file_bytes,
        "over_the_numbers": round(file_bytes / numbers, 4) if numbers else None,
        "basis_numbers": bank.plan.n_factors,
        "worst_rounding_error": worst,
    }


def verify(bank: CoreBank, tick: Tick | None = None) -> dict[str, Any]:
    """Read everything: the basis, every page of the file of tasks, and every task with its checksum.

    Args:
        bank: The bank.
        tick: Called as tasks are done.

    Returns:
        `ok`; `tasks`, how many there are; `damaged`, each with its name and the reason; `file`, what is wrong with the
        file itself; `basis`, what is wrong with the basis.
    """
    found: dict[str, Any] = {"ok": True, "tasks": 0, "damaged": [], "file": [], "basis": None}
    try:
        bank.basis_tensors()
    except CheckpointError as error:
        found["basis"] = str(error)
    found["file"] = bank.store.complaints()
    try:
        places = bank.store.places()
    except CheckpointError as error:
        found["file"].append(f"The names of the tasks cannot be read. {error}")
        places = []
    found["tasks"] = len(places)
    for done, (place, name) in enumerate(places, start=1):
        try:
            to_tasks([bank.store.read_at(place, name)], bank.layout)
        except CheckpointError as error:
            found["damaged"].append({"task": name, "reason": str(error)})
        if tick is not None:
            tick(done, len(places))
    found["ok"] = not (found["basis"] or found["file"] or found["damaged"])
    return found


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
