"""A bank on its base model, for the rows of data: every row is answered by its own task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..bank import CoreBank, Task
from ..bank.heads import row_losses
from ..errors import ConfigError, DataError
from . import metrics
from .answers import answers
from .columns import Columns, chat_column
from .data import EVERY
from .encode import collator, encode
from .models import load_model, load_tokenizer
from .sources import BUILT_IN, read
from .trained import device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from ..bank.model import TaskRows

Tick = Callable[[int, int], None]  # rows done, rows in all


@dataclass
class Served:
    """A bank, and a model on which its tasks answer."""

    bank: CoreBank
    model: PeftModel
    tokenizer: Any
    kind: str

    @property
    def rows(self) -> TaskRows:
        """Which task each row has."""
        rows: TaskRows = self.model.base_model.tasks
        return rows

    def fresh_numbers(self) -> Tensor:  # (size,)
        """Return the numbers with which a task begins: those that the adapter on the model has."""
        from peft import get_peft_model_state_dict

        own = get_peft_model_state_dict(self.model, adapter_name=self.model.active_adapter)
        return self.bank.layout.flatten(own).float().cpu()

    def collator(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Return what makes a batch of rows of any tasks; class ids are real numbers beside those of a regression."""
        return collator(self.tokenizer, "causal-lm" if self.kind == "causal-lm" else "regression")

    def rest(self) -> None:
        """Answer with the tasks as the bank holds them."""
        self.model.eval()
        slab = self.rows.slab
        slab.source, slab.came, slab.leaves = self.bank, None, None
        slab.numbers.requires_grad_(False)
        for table in slab.heads.tables.values() if slab.heads is not None else ():
            table.requires_grad_(False)
        slab.forget()


def load_served(
    bank: CoreBank | str | Path,
    model: str | None = None,
    kind: str | None = None,
    capacity: int | str = 1024,
    dtype: str = "float32",
) -> Served:
    """Put a bank on its base model.

    Args:
        bank: A bank, or its folder.
        model: Base model to use instead of the recorded one.
        kind: classification (or regression), or causal-lm; default: what the bank's tasks are.
        capacity: Tasks in memory, a number or bytes.
        dtype: Type of the base model.

    Raises:
        CheckpointError: The bank or the base model is not the right one.
        ConfigError: The base model cannot be loaded.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bank = bank if isinstance(bank, CoreBank) else CoreBank.open(bank)
    name = base_of(bank, model)
    if kind is None:
        first = next(islice(bank.names(), 1), None)
        kind = str(bank.get(first).task) if first is not None else "classification"
    kind = "causal-lm" if kind == "causal-lm" else "classification"
    tokenizer = tokenizer_of(name)
    labels = ("0", "1") if kind == "classification" else ()
    base = load_model(name, kind, labels, dtype, tokenizer).to(device())
    limit = int(capacity) if isinstance(capacity, str) and capacity.isdigit() else capacity
    return Served(bank, bank.wrap(base, limit), tokenizer, kind)


def base_of(bank: CoreBank, model: str | None = None) -> str:
    """Return the name of a bank's base model.

    Raises:
        ConfigError: It is not recorded, and no other is given.
    """
    name = model or bank.base_model
    if name is None:
        raise ConfigError(f"The bank in {bank.path} does not tell its base model. Name it with --model.")
    return name


def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a base model, with a token to pad with."""
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ---------------------------------------------------------------------- rows of many tasks through the model


def _logits(
    served: Served, rows: Sequence[tuple[str, dict[str, Any]]], batch_size: int, tick: Tick | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield place, logits and labels of every row; long rows go with long rows, whatever their tasks."""
    collate = served.collator()
    size = min(batch_size, served.rows.slab.capacity)
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n][1]["input_ids"]))
    for at in range(0, len(order), size):
        places = order[at : at + size]
        batch = collate([{k: v for k, v in rows[n][1].items() if k != "length"} for n in places])
        labels = batch.pop("labels", None)
        with torch.inference_mode():
            inputs = {name: value.to(served.model.device) for name, value in batch.items()}
            logits = served.model(**inputs, task_ids=[rows[n][0] for n in places]).logits.float().cpu()
        for n, place in enumerate(places):
            yield place, logits[n], None if labels is None else labels[n]
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
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in rows}
    losses: dict[str, list[float]] = {name: [] for name in rows}
    for place, logits, labels in _logits(served, flat, batch_size, tick):
        name = flat[place][0]
        assert labels is not None
        if served.kind == "causal-lm":
            losses[name].append(float(row_losses(logits[None, :-1], labels[None, 1:])[0]))
        else:
            seen[name].append((logits, labels))
    if served.kind == "causal-lm":
        return {
            name: {"rows": len(values), "loss": float(np.mean(values))} for name, values in losses.items()
        }
    return {name: _scores(served.bank.get(name), pairs) for name, pairs in seen.items()}


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
    data = read(source, "test" if source == BUILT_IN else None, EVERY)
    clash = {"prediction", "confidence"} & set(data.column_names)
    if clash:
        raise DataError(
            f'{source} has a column "{min(clash)}" already. Rename it, so that nothing is overwritten.'
        )
    names = [str(task)] * len(data) if task_column is None else _named(data, task_column, source)
    tasks = {name: served.bank.get(name) for name in dict.fromkeys(names)}
    plain = [dict(row) for row in cast("Any", data)]
    if served.kind == "causal-lm":
        return _answered(served, data, plain, names, tasks, max_new_tokens, tick)
    rows: list[tuple[str, dict[str, Any]]] = [("", {})] * len(names)
    for name, found in tasks.items():
        places = [n for n, other in enumerate(names) if other == name]
        for place, row in zip(places, cast("Any", _encoded(served, data.select(places), found)), strict=True):
            rows[place] = (name, row)
    for place, logits, _ in _logits(served, rows, batch_size, tick):
        plain[place] |= _prediction(tasks[names[place]], logits)
    return plain


def _named(data: Dataset, column: str, source: str) -> list[str]:
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


def _encoded(served: Served, rows: Dataset, task: Task) -> Dataset:
    columns = Columns(**task.metadata.get("columns", {}))
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
    tasks: Mapping[str, Task],
    max_new_tokens: int,
    tick: Tick | None,
) -> list[dict[str, Any]]:
    made = []
    for n, (row, name) in enumerate(zip(plain, names, strict=True), 1):
        columns = Columns(**tasks[name].metadata.get("columns", {}))
        asker = _Asker(served.model, served.tokenizer, columns)
        with served.model.select([name]):
            (text,) = answers(asker, [row], chat_column(data, columns), max_new_tokens, None)  # type: ignore[arg-type]
        made.append({**row, "prediction": text})
        if tick is not None:
            tick(n, len(plain))
    return made


@dataclass
class _Asker:
    """What `answers` needs of a trained model."""

    model: PeftModel
    tokenizer: Any
    columns: Columns
