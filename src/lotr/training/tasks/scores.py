"""Rows of data through a bank: scores of its tasks, and predictions, in batches mixed from all tasks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...bank import Task
from ...bank.heads import row_losses
from ...errors import ConfigError, DataError
from .. import metrics
from ..data import Columns, encode, read, rows_of_task
from ..data.tables import Table
from ..inference import Tick, answers, batches, check_new_columns, prediction
from .served import Served
from .task_list import together

if TYPE_CHECKING:
    from datasets import Dataset


def scores_of_tasks(served: Served, rows: Mapping[str, Dataset]) -> dict[str, dict[str, float]]:
    """Measure tasks on encoded rows with labels, all in mixed batches.

    Returns:
        Task → scores by name, and the number of rows.
    """
    names, mixed = list(rows), together(list(rows.values()))
    task_of = mixed["task"][:]
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    size = min(64, served.rows.cache.capacity)
    for numbers, logits, labels in batches(served.model, served.collator(), mixed, size, tasks=names):
        assert labels is not None
        if served.kind == "causal-lm":
            values: Any = row_losses(logits[:, :-1], labels[:, 1:]).tolist()
        else:
            values = zip(logits.cpu(), labels.cpu(), strict=True)
        for number, value in zip(numbers, values, strict=True):
            outputs[names[task_of[number]]].append(value)
    if served.kind == "causal-lm":
        return {name: {"rows": len(own), "loss": float(np.mean(own))} for name, own in outputs.items()}
    return {name: _scores(served.bank.get(name), pairs) for name, pairs in outputs.items()}


def _scores(task: Task, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    n = len(task.labels) or 1
    logits = torch.stack([logits[:n] for logits, _ in pairs]).numpy()
    labels = torch.stack([label for _, label in pairs]).numpy()
    if task.task == "regression":
        return {"rows": len(pairs), **metrics.regression(logits, labels)}
    return {"rows": len(pairs), **metrics.classification(logits, labels.astype(int))}


def predict(
    served: Served,
    source: str,
    task: str | None = None,
    task_column: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    tick: Tick | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of the data with a prediction each, by one task or by the task that each row names.

    Args are those of `lotr.training.predict.predict`, where `adapter` is a bank that `load_served` made ready.

    Raises:
        ConfigError: Neither or both of task and task_column are given.
        UnknownTaskError: The bank has no such task.
        DataError: The data does not fit a task.
    """
    if (task is None) == (task_column is None):
        raise ConfigError(
            "Which task answers? Give one of --task (for all rows) and --task-column (row by row)."
        )
    table, _ = read(source)
    check_new_columns(table, source)
    names = [str(task)] * len(table) if task_column is None else _task_names(table, task_column, source)
    numbers: dict[str, list[int]] = {}
    for n, name in enumerate(names):
        numbers.setdefault(name, []).append(n)
    tasks = {name: served.bank.get(name) for name in numbers}
    parts = []
    for name, own in tasks.items():
        own_columns = Columns(**own.metadata.get("columns", {})).named(**columns or {})
        rows, pairs = table.take(numbers[name]), own.metadata.get("pairs", False)
        parts.append(rows_of_task(rows, own_columns, own.task, source, False, pairs))  # type: ignore[arg-type]
    order = [n for own in numbers.values() for n in own]
    predicted: list[dict[str, Any]] = [{}] * len(order)
    if served.kind == "causal-lm":
        for n, row in zip(order, itertools.chain.from_iterable(parts), strict=True):
            predicted[n] = row
        predicted = answers(served.model, served.tokenizer, predicted, max_new_tokens, tick, names)
    else:
        encoded = [_encoded(served, part, own) for part, own in zip(parts, tasks.values(), strict=True)]
        mixed = together(encoded).select(np.argsort(order))
        size = min(batch_size, served.rows.cache.capacity)
        for at, logits, _ in batches(served.model, served.collator(), mixed, size, tick, list(tasks)):
            for n, row in zip(at, logits.cpu(), strict=True):
                predicted[n] = prediction(str(tasks[names[n]].task), tasks[names[n]].labels, row)
    return [{**row, **own} for row, own in zip(table.rows(), predicted, strict=True)]


def _task_names(table: Table, name: str, source: str) -> list[str]:
    column = table.check(name, "--task-column", source)
    values = ["" if value is None else str(value).strip() for value in table[column]]
    empty = [n for n, value in enumerate(values, 1) if not value]
    if empty:
        raise DataError(
            f'Row {empty[0]} of {source} names no task in column "{column}" ({len(empty)} do not).'
        )
    return values


def _encoded(served: Served, rows: Dataset, task: Task) -> Dataset:
    length = int(task.metadata.get("max_length", 128))
    return encode(rows, served.tokenizer, str(task.task), task.labels, length, with_labels=False)  # type: ignore[arg-type]
