"""A task as a row of plain values, and back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .codec import DTYPES, decode, encode, head_dtype, n_bytes, rounding_error
from .layout import Layout
from .row import Row
from .task import Task


def to_row(task: Task, layout: Layout, dtype: str) -> Row:
    """Return a task as it is kept.

    Raises:
        ConfigError: Its numbers do not fit the layout or the type, or its metadata is no JSON.
    """
    if tuple(task.numbers.shape) != (layout.size,):
        raise ConfigError(
            f"Task {task.name!r} has numbers of shape {tuple(task.numbers.shape)}, and a task of this bank has "
            f"({layout.size},), in {layout.n_cores} cores. Train it on the bank's basis, with the bank's rank."
        )
    try:
        numbers = encode(task.numbers, layout, dtype)
        said = {"task": task.task, "labels": list(task.labels), "metadata": dict(task.metadata)}
        about = json.dumps({key: value for key, value in said.items() if value}, ensure_ascii=False)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"Task {task.name!r} cannot be kept: {error}") from None
    lost = rounding_error(task.numbers.detach().float().cpu(), decode([numbers], layout, dtype)[0])
    head = {key: _kept(tensor, head_dtype(dtype)) for key, tensor in task.head.items()}
    return Row(task.name, dtype, time.time(), lost, about, numbers, save(head) if head else b"")


def to_tasks(rows: Sequence[Row], layout: Layout) -> tuple[Tensor, list[Task]]:  # (n, size)
    """Return the numbers of rows in float32, and the tasks, whose numbers are rows of them.

    Raises:
        CheckpointError: A row is whole, and yet no task of this bank.
    """
    numbers = torch.empty(len(rows), layout.size)
    for row in rows:
        if row.dtype not in DTYPES or len(row.numbers) != n_bytes(layout, row.dtype):
            raise CheckpointError(
                f"Task {row.name!r} has {len(row.numbers)} bytes of {row.dtype}, and a task of this bank has "
                f"{layout.size} numbers: another program wrote it. Remove it, or write it again."
            )
    for dtype in {row.dtype for row in rows}:
        at = [n for n, row in enumerate(rows) if row.dtype == dtype]
        numbers[at] = decode([rows[n].numbers for n in at], layout, dtype)
    return numbers, [_task(row, own) for row, own in zip(rows, numbers, strict=True)]


def _task(row: Row, numbers: Tensor) -> Task:
    said = json.loads(row.about)
    head = {key: _kept(tensor, torch.float32) for key, tensor in (load(row.head) if row.head else {}).items()}
    return Task(
        row.name, numbers, head, tuple(said.get("labels", ())), said.get("task"), said.get("metadata", {})
    )


def _kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    plain = tensor.detach().cpu().contiguous()
    return plain.to(dtype) if plain.is_floating_point() else plain
