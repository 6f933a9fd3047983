"""What is learned from which rows: the columns, the task, its labels, and the rows to evaluate on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import DataError
from .columns import (
    Columns,
    Task,
    check_column,
    check_rows,
    check_task,
    guess_task,
    label_names,
    label_values,
)
from .sources import read_splits

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
HELD_OUT_PART = 0.1


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
    seed: int = 0,
) -> TaskData:
    """Read the rows of a training run, find out the task, and check that both parts fit it.

    Args:
        train: Source of the rows to learn from, see `lotr.training.data.sources.read_splits`.
        eval: Source of the rows to measure on. Default: the validation (else test) split of `train`; where
            it has neither, a tenth of its rows, drawn by a seeded shuffle.
        columns: Names of the columns.
        task: Default: guessed from the columns, see `guess_task`.
        seed: Seed of that shuffle.

    Raises:
        ConfigError: `task` is unknown.
        DataError: A source cannot be read, a column is missing, or values do not fit the task.

    Example:
        >>> data = load_task("docstrings")
        >>> data.task, len(data.labels)
        ('classification', 16)
    """
    columns = columns or Columns()
    if task is not None:
        check_task(task)
    splits = read_splits(train, columns.label)
    rows = _split(splits, train, "train")
    reason = f"task={task} was asked for."
    if task is None:
        # a label column that was named but is missing must not turn the task into another
        if columns.label != Columns.label:
            check_column(rows, columns.label, "--label", train)
        task, reason = guess_task(rows, columns)
    check_rows(rows, columns, task, train)
    labels = label_names(rows, columns) if task == "classification" else ()
    if labels and len(set(label_values(rows, columns))) == 1:
        raise DataError(
            f'All rows of {train} have one label, "{label_values(rows, columns)[0]}"; there is nothing to tell '
            "apart. Name another column with --label."
        )
    if eval is not None:
        eval_rows, eval_source = read(eval, columns.label)
    elif _held_out_split(splits):
        eval_rows, eval_source = _held_out(splits, train)
    else:
        n_rows = len(rows)
        n_held_out = max(1, round(n_rows * HELD_OUT_PART))
        if n_held_out == n_rows:
            raise DataError(
                f"{train} has 1 rows, which would be held out: none is left to learn from. Add rows, or name "
                "others to measure on with --eval."
            )
        order = random.Random(seed).sample(range(n_rows), n_rows)
        eval_rows = rows.select(sorted(order[:n_held_out]))
        rows = rows.select(sorted(order[n_held_out:]))
        eval_source = f"{n_held_out} of the {n_rows} rows of {train}, held out by a shuffle, seed {seed}"
        reason += f" Measured on {eval_source}."
    check_rows(eval_rows, columns, task, eval_source, labels, train)
    if task != "causal-lm" and (columns.text2 in rows.column_names) != (
        columns.text2 in eval_rows.column_names
    ):
        raise DataError(
            f'Only one of {train} and {eval_source} has the column "{columns.text2}": pairs of texts and '
            "single texts are different tasks. Name the column of the second text with --text2."
        )
    return TaskData(task, rows, eval_rows, labels, reason, eval_source)


def load_rows(
    source: str, columns: Columns, task: Task, labels: Sequence[str] = (), need_label: bool = True
) -> Dataset:
    """Read rows to evaluate a trained adapter on, or to predict, and check them.

    Args:
        source: See `read`.
        columns: Names of the columns.
        task: The adapter's task.
        labels: The adapter's classes, in the order of their ids.
        need_label: Whether the rows must have labels that the adapter knows; not needed to predict.

    Raises:
        DataError: The source cannot be read, a column is missing, or values do not fit the task.
    """
    rows, name = read(source, columns.label if need_label else None)
    check_rows(rows, columns, task, name, labels, "the adapter", need_label)
    return rows


def read(source: str, label: str | None = None) -> tuple[Dataset, str]:
    """Read rows that are not for training: the validation split of a source, else test, else train.

    Arguments and errors are those of `read_splits`; the second value is what to call the rows in a message.
    """
    return _held_out(read_splits(source, label), source)


def _held_out(splits: dict[str, Dataset], source: str) -> tuple[Dataset, str]:
    name = _held_out_split(splits) or "train"
    return _split(splits, source, name), source if len(splits) == 1 else f'split "{name}" of {source}'


def _held_out_split(splits: dict[str, Dataset]) -> str | None:
    # MNLI has validation_matched
    names = [name for wanted in HELD_OUT_SPLITS for name in splits if name.split("_")[0] == wanted]
    return names[0] if names and len(splits) > 1 else None


def _split(splits: dict[str, Dataset], source: str, name: str) -> Dataset:
    name = next(iter(splits)) if len(splits) == 1 else name
    if name not in splits:
        raise DataError(f'{source} has no split "{name}". Its splits: {", ".join(splits)}.')
    if not len(splits[name]):
        raise DataError(f'Split "{name}" of {source} has no rows; there is nothing to read.')
    return splits[name]
