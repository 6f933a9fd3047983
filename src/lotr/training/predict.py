"""What a trained adapter says of data: scores and predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters import plots
from ..bank import CoreBank
from ..errors import ConfigError, DataError
from ..files.adapter_folder import is_bank
from .data import collator, encode, read, rows_of_task
from .data.tables import Table
from .inference import Tick, answers, measured, outputs, prediction
from .tasks.served import Served, load_served
from .tasks.task_list import together
from .trained import Trained, load_trained


def evaluate(
    adapter: str | Path | Trained,
    data: str,
    *,
    model: str | None = None,
    text: str | None = None,
    text2: str | None = None,
    label: str | None = None,
    batch_size: int = 64,
    picture: str | Path | None = None,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Measure an adapter on data.

    Args:
        adapter: Folder or hub id; or what `load_trained` returned, to load it once.
        data: Data with labels: a file, folder, hub data set or `docstrings`.
        model: Base model to use instead of the recorded one.
        text: Column with the text, where it is not that of the training.
        text2: Column with the second text.
        label: Column with the label.
        batch_size: Rows at a time.
        picture: PNG file for the confusion matrix of a classifier.
        tick: Called as rows are done.

    Returns:
        Scores by name, the number of rows, the labels, and for classification the confusion counts.

    Raises:
        ConfigError: The folder of the picture does not exist.
        DataError: The data does not fit the adapter's task.
    """
    if picture is not None:
        plots.check_picture(Path(picture))
    trained = adapter if isinstance(adapter, Trained) else load_trained(adapter, model)
    task = replace(trained.task, columns=trained.task.columns.named(text=text, text2=text2, label=label))
    encoded = encode(rows_of_task(read(data), task), trained.tokenizer, trained.task)
    collate = collator(trained.tokenizer, task.task)
    report = {
        "labels": list(task.labels),
        **measured(trained.model, collate, task, encoded, batch_size, tick),
    }
    if picture is not None and "confusion" in report:
        plots.confusion(np.array(report["confusion"]), task.labels, Path(picture))
    return report


def predict(
    adapter: str | Path | Trained | Served,
    data: str,
    *,
    task: str | None = None,
    task_column: str | None = None,
    model: str | None = None,
    text: str | None = None,
    text2: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    tick: Tick | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of the data with a prediction each.

    Args:
        adapter: Folder or hub id of an adapter, or folder of a bank; or what `load_trained` or `load_served` returned.
        data: Data; labels are not needed.
        task: Of a bank: the task that answers all rows.
        task_column: Of a bank: column with the task that answers each row.
        model: Base model to use instead of the recorded one.
        text: Column with the text, where it is not that of the training.
        text2: Column with the second text.
        batch_size: Rows at a time.
        max_new_tokens: Longest answer of a language model, in tokens.
        tick: Called as rows are done.

    Returns:
        Rows with `prediction`, and for classification `confidence`, the probability of the predicted class.

    Raises:
        ConfigError: A task is named and the adapter is no bank, or it is one and not one of both is named.
        UnknownTaskError: The bank has no such task.
        DataError: The data does not fit a task.
    """
    loaded: Trained | Served | None = adapter if isinstance(adapter, Trained | Served) else None
    of_bank = isinstance(adapter, Served) or (loaded is None and is_bank(Path(str(adapter))))
    if of_bank and (task is None) == (task_column is None):
        raise ConfigError(
            "Which task answers? Give one of --task (for all rows) and --task-column (row by row)."
        )
    if not of_bank and (task is not None or task_column is not None):
        raise ConfigError(f"{adapter} is no bank, so it has no tasks. Leave out --task and --task-column.")
    table = read(data)
    if clash := {"prediction", "confidence"} & table.columns.keys():
        raise DataError(
            f'{table.name} has a column "{min(clash)}" already. Rename it, so that nothing is overwritten.'
        )
    names = [str(task)] * len(table) if task_column is None else _task_names(table, task_column)
    numbers: dict[str, list[int]] = {}
    for n, name in enumerate(names):
        numbers.setdefault(name, []).append(n)
    if loaded is None and of_bank:
        bank = CoreBank.open(str(adapter))
        loaded = load_served(bank, model, bank.get(names[0]).task if names else None)
    loaded = loaded or load_trained(str(adapter), model)
    records = {n: loaded.task if isinstance(loaded, Trained) else loaded.record(n) for n in numbers}
    parts = []
    for name, record in records.items():
        columns = record.columns.named(text=text, text2=text2)
        parts.append(rows_of_task(table.take(numbers[name]), replace(record, columns=columns), False))
    of_table = [n for own in numbers.values() for n in own]  # of the parts' rows, one task behind the other
    tokenizer, (first, *_) = loaded.tokenizer, records.values()
    if first.task == "causal-lm":
        rows = dict(zip(of_table, (row for part in parts for row in part.rows()), strict=True))
        predicted = answers(loaded.model, tokenizer, rows, max_new_tokens, tick, names if of_bank else ())
    else:
        encoded = [encode(rows, tokenizer, own) for rows, own in zip(parts, records.values(), strict=True)]
        mixed, collate, tasks = together(encoded), collator(tokenizer, first.task), tuple(records)
        size = min(batch_size, loaded.rows.cache.capacity) if isinstance(loaded, Served) else batch_size
        predicted = {}
        for at, logits, _ in outputs(loaded.model, collate, mixed, size, tick, tasks if of_bank else ()):
            own = records[names[of_table[at]]]
            predicted[of_table[at]] = prediction(own.task, own.labels, logits)
    return [{**row, **predicted[n]} for n, row in enumerate(table.rows())]


def _task_names(table: Table, name: str) -> list[str]:
    column = table.check(name, "--task-column")
    values = ["" if value is None else str(value).strip() for value in table[column]]
    empty = [n for n, value in enumerate(values, 1) if not value]
    if empty:
        raise DataError(
            f'Row {empty[0]} of {table.name} names no task in column "{column}" ({len(empty)} do not).'
        )
    return values
