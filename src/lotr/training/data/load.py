"""What is learned from which rows: the columns, the task, its labels, and the rows to evaluate on."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import ConfigError, DataError
from .columns import (
    Columns,
    Task,
    chat_column,
    check_classes,
    check_columns,
    check_numbers,
    check_task,
    guess_task,
    label_names,
    label_values,
)
from .sources import choose_split, read, read_splits

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Columns",
    "Task",
    "TaskData",
    "chat_column",
    "check_columns",
    "guess_task",
    "label_names",
    "label_values",
    "load_rows",
    "load_task",
    "read",
]


class _Every(tuple[str, ...]):
    """All column names: rows that are written back keep what stood in the file, digit by digit."""

    def __contains__(self, name: object) -> bool:
        return True


EVERY = _Every()
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class TaskData:
    """All that a training run needs to know about its data.

    Attributes:
        task: What is learned.
        train: Rows to learn from.
        eval: Rows to measure on.
        labels: Names of the classes in the order of their ids; () unless the task is classification.
        reason: Why it is this task, in one sentence.
        eval_source: Where the rows to measure on come from.
    """

    task: Task
    train: Dataset
    eval: Dataset
    labels: tuple[str, ...]
    reason: str
    eval_source: str


def load_task(
    train: str,
    eval: str | None = None,
    columns: Columns | None = None,
    task: Task | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> TaskData:
    """Read the rows of a training run, find out the task, and check that both parts fit it.

    Args:
        train: Source of the rows to learn from, see `lotr.training.data.sources.read`.
        eval: Source of the rows to measure on. Default: the validation (else test) split of `train`; where
            it has neither, a part of its rows, drawn by a seeded shuffle.
        columns: Names of the columns.
        task: Default: guessed from the columns, see `guess_task`.
        holdout: The part of the rows to hold out, between 0 and 1.
        seed: Seed of that shuffle.

    Returns:
        The task with its rows.

    Raises:
        ConfigError: `task` is unknown, or `holdout` is no part of a whole.
        DataError: A source cannot be read, a column is missing, or values do not fit the task.

    Example:
        >>> data = load_task("docstrings")
        >>> data.task, len(data.labels)
        ('classification', 16)
    """
    columns = columns or Columns()
    if task is not None:
        check_task(task)
    if not 0 < holdout < 1:
        raise ConfigError(f"holdout={holdout} is no part of the rows: give a number between 0 and 1.")
    splits = read_splits(train, (columns.text, columns.text2))
    rows = choose_split(splits, train)
    if task is None:
        # a label column that was named but is missing must not turn the task into another
        if columns.label != Columns.label:
            check_columns(rows, columns, True, train, chat=True)
        task, reason = guess_task(rows, columns)
    else:
        reason = f"task={task} was asked for."
    labels = _check_rows(rows, columns, task, train)
    present = set(label_values(rows, columns)) if labels else set()
    if len(present) == 1:
        raise DataError(
            f'All rows of {train} have one label, "{present.pop()}"; there is nothing to tell apart. '
            "Name another column with --label."
        )

    inner = _held_out_split(splits)
    if eval is not None:
        eval_rows, eval_source = _read_held_out(eval, (columns.text, columns.text2))
    elif inner is not None:
        eval_rows, eval_source = choose_split(splits, train, inner), f'split "{inner}" of {train}'
    else:
        whole = len(rows)
        rows, eval_rows = _hold_out(rows, holdout, seed, train)
        eval_source = f"{len(eval_rows)} of the {whole} rows of {train}, held out by a shuffle, seed {seed}"
        reason += f" Measured on {eval_source}."
    _check_rows(eval_rows, columns, task, eval_source, labels, train)
    if task != "causal-lm" and (columns.text2 in rows.column_names) != (
        columns.text2 in eval_rows.column_names
    ):
        raise DataError(
            f'Only one of {train} and {eval_source} has the column "{columns.text2}": pairs of texts and '
            "single texts are different tasks. Name the column of the second text with --text2."
        )
    return TaskData(task, rows, eval_rows, labels, reason, eval_source)


def load_rows(
    source: str,
    columns: Columns,
    task: Task,
    labels: Sequence[str] = (),
    need_label: bool = True,
    split: str | None = None,
) -> Dataset:
    """Read rows for an adapter that is trained already.

    Args:
        source: See `lotr.training.data.sources.read`.
        columns: Names of the columns.
        task: The adapter's task.
        labels: The adapter's classes, in the order of their ids.
        need_label: Whether the rows must have labels that the adapter knows; not needed to predict.
        split: Default: the validation split, else test, else the only one.

    Returns:
        The rows, checked.

    Raises:
        DataError: The source cannot be read, a column is missing, or values do not fit the task.
    """
    strings = (columns.text, columns.text2) if need_label else EVERY
    if split is None:
        rows, name = _read_held_out(source, strings)
    else:
        rows, name = read(source, split, strings), f'split "{split}" of {source}'
    if need_label:
        _check_rows(rows, columns, task, name, labels, "the adapter")
    else:
        check_columns(rows, columns, False, name, chat=task == "causal-lm")
    return rows


def _check_rows(
    rows: Dataset,
    columns: Columns,
    task: Task,
    source: str,
    labels: Sequence[str] | None = None,
    known: str = "",
) -> tuple[str, ...]:
    """Check rows against the task and, where `labels` are given, against the classes that `known` has."""
    check_columns(rows, columns, task != "causal-lm", source, chat=task == "causal-lm")
    if task == "regression":
        check_numbers(rows, columns, source)
    if task != "classification":
        return ()
    if labels is None:
        return label_names(rows, columns)
    check_classes(rows, columns, labels, source, known)
    return tuple(labels)


def _held_out_split(splits: dict[str, Dataset]) -> str | None:
    # MNLI has validation_matched; "train" alone is never a split to measure on
    for wanted in HELD_OUT_SPLITS:
        for name in splits:
            if name == wanted or name.startswith(f"{wanted}_"):
                return name
    return None


def _read_held_out(source: str, strings: Collection[str]) -> tuple[Dataset, str]:
    splits = read_splits(source, strings)
    inner = _held_out_split(splits)
    name = source if len(splits) == 1 else f'split "{inner or "train"}" of {source}'
    return choose_split(splits, source, inner), name


def _hold_out(rows: Dataset, part: float, seed: int, source: str) -> tuple[Dataset, Dataset]:
    n_held_out = max(1, round(len(rows) * part))
    if n_held_out >= len(rows):
        raise DataError(
            f"{source} has {len(rows)} rows, of which {n_held_out} would be held out: none is left to learn "
            "from. Add rows, or name others to measure on with --eval."
        )
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    held_out, kept = sorted(order[:n_held_out]), sorted(order[n_held_out:])
    return rows.select(kept), rows.select(held_out)
