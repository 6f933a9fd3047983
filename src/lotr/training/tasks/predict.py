"""Rows of data through a bank: scores of its tasks, and predictions, in batches mixed from all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ...bank import Task
from ...bank.heads import row_losses
from ...errors import ConfigError, DataError
from .. import metrics
from ..data import Columns, chat_column, encode, read
from ..predict import answers
from .served import Served

if TYPE_CHECKING:
    from datasets import Dataset

Tick = Callable[[int, int], None]  # rows done, rows in all


def _logits(
    served: Served, rows: Sequence[tuple[str, dict[str, Any]]], batch_size: int, tick: Tick | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield number, logits and labels of every row; long rows go with long rows, whatever their tasks."""
    collate = served.collator()
    size = min(batch_size, served.rows.cache.capacity)
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n][1]["input_ids"]))
    for at in range(0, len(order), size):
        numbers = order[at : at + size]
        batch = collate([{k: v for k, v in rows[n][1].items() if k != "length"} for n in numbers])
        labels = batch.pop("labels", None)
        with torch.inference_mode():
            inputs = {name: value.to(served.model.device) for name, value in batch.items()}
            logits = served.model(**inputs, task_ids=[rows[n][0] for n in numbers]).logits.float().cpu()
        for n, number in enumerate(numbers):
            yield number, logits[n], None if labels is None else labels[n]
        if tick is not None:
            tick(min(at + size, len(order)), len(order))


def scores_of_tasks(
    served: Served, rows: Mapping[str, Dataset], batch_size: int = 64, tick: Tick | None = None
) -> dict[str, dict[str, float]]:
    """Measure tasks on encoded rows with labels, all in mixed batches.

    Returns:
        Task → scores by name, and the number of rows.
    """
    flat = [(name, row) for name, data in rows.items() for row in cast("Any", data)]
    outputs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in rows}
    losses: dict[str, list[float]] = {name: [] for name in rows}
    for n, logits, labels in _logits(served, flat, batch_size, tick):
        name = flat[n][0]
        assert labels is not None
        if served.kind == "causal-lm":
            losses[name].append(float(row_losses(logits[None, :-1], labels[None, 1:])[0]))
        else:
            outputs[name].append((logits, labels))
    if served.kind == "causal-lm":
        return {name: {"rows": len(own), "loss": float(np.mean(own))} for name, own in losses.items()}
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

    Args:
        served: See `load_served`.
        source: Data; labels are not needed.
        task: The task of all rows.
        task_column: Column with the name of each row's task, instead.
        columns: Names of the columns `text` and `text2`, where they are not those of the training.
        batch_size: Rows at a time, of any tasks.
        max_new_tokens: Longest answer of a language model, in tokens.
        tick: Called as rows are done.

    Returns:
        Rows with `prediction`, and for classification `confidence`, the probability of the predicted class.

    Raises:
        ConfigError: Neither or both of task and task_column are given.
        UnknownTaskError: The bank has no such task.
        DataError: The data does not fit a task.
    """
    if (task is None) == (task_column is None):
        raise ConfigError(
            "Which task answers? Give one of --task (for all rows) and --task-column (row by row)."
        )
    data, _ = read(source)
    clash = {"prediction", "confidence"} & set(data.column_names)
    if clash:
        raise DataError(
            f'{source} has a column "{min(clash)}" already. Rename it, so that nothing is overwritten.'
        )
    names = [str(task)] * len(data) if task_column is None else _task_names(data, task_column, source)
    tasks = {name: served.bank.get(name) for name in dict.fromkeys(names)}
    columns_of = {
        name: Columns(**own.metadata.get("columns", {})).named(**columns or {}) for name, own in tasks.items()
    }
    plain = [dict(row) for row in cast("Any", data)]
    if served.kind == "causal-lm":
        return _answered(served, data, plain, names, columns_of, max_new_tokens, tick)
    rows: list[tuple[str, dict[str, Any]]] = [("", {})] * len(names)
    for name, own in tasks.items():
        numbers = [n for n, other in enumerate(names) if other == name]
        encoded = _encoded(served, data.select(numbers), own, columns_of[name])
        for n, row in zip(numbers, cast("Any", encoded), strict=True):
            rows[n] = (name, row)
    for n, logits, _ in _logits(served, rows, batch_size, tick):
        plain[n] |= _prediction(tasks[names[n]], logits)
    return plain


def _task_names(data: Dataset, column: str, source: str) -> list[str]:
    if column not in data.column_names:
        raise DataError(
            f'{source} has no column "{column}"; its columns are: {", ".join(data.column_names)}. Name the right one '
            "with --task-column."
        )
    values = data[column][:]
    empty = [n for n, value in enumerate(values, 1) if value is None or str(value) == ""]
    if empty:
        raise DataError(
            f'Row {empty[0]} of {source} names no task in column "{column}" ({len(empty)} do not).'
        )
    return [str(value) for value in values]


def _encoded(served: Served, rows: Dataset, task: Task, columns: Columns) -> Dataset:
    if columns.text2 in rows.column_names and not task.metadata.get("pairs", False):
        rows = rows.remove_columns(columns.text2)
    length = int(task.metadata.get("max_length", 128))
    return encode(rows, served.tokenizer, str(task.task), columns, task.labels, length, with_labels=False)  # type: ignore[arg-type]


def _prediction(task: Task, logits: Tensor) -> dict[str, Any]:
    if task.task == "regression":
        return {"prediction": float(logits[0])}
    share = torch.softmax(logits[: len(task.labels)], -1)
    return {"prediction": task.labels[int(share.argmax())], "confidence": round(float(share.max()), 6)}


def _answered(
    served: Served,
    data: Dataset,
    plain: list[dict[str, Any]],
    names: Sequence[str],
    columns_of: Mapping[str, Columns],
    max_new_tokens: int,
    tick: Tick | None,
) -> list[dict[str, Any]]:
    answered = []
    for n, (row, name) in enumerate(zip(plain, names, strict=True), 1):
        columns = columns_of[name]
        with served.model.select([name]):
            chats = chat_column(data, columns)
            (text,) = answers(
                served.model, served.tokenizer, [row], columns.text, chats, max_new_tokens, None
            )
        answered.append({**row, "prediction": text})
        if tick is not None:
            tick(n, len(plain))
    return answered
