"""What is learned from which rows: the columns, the task, its labels, and the rows to evaluate on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from ...errors import DataError
from ...tuner.checks import one_of
from .columns import Columns, Task, check_labels, guess_task, label_names, label_values, rows_of_task
from .encode import encode
from .sources import HELD_OUT_SPLITS, read_splits
from .tables import Table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

HELD_OUT_PART = 0.1


@dataclass(frozen=True)
class TaskData:
    """All that a training run needs to know about its data."""

    task: Task
    train: Dataset
    eval: Dataset
    labels: tuple[str, ...]  # the classes in the order of their ids; () unless the task is classification
    reason: str  # why it is this task, in one sentence
    eval_source: str  # where the rows to evaluate on come from
    columns: Columns
    pairs: bool  # whether the rows are pairs of texts

    @property
    def sizes(self) -> dict[str, int]:
        """Rows to train on, and to evaluate on."""
        return {"train": len(self.train), "eval": len(self.eval)}

    def encoded(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
        """Return the same with its rows as the model takes them."""
        parts = (self.train, self.eval)
        train, eval = (encode(part, tokenizer, self.task, self.labels, max_length) for part in parts)
        return replace(self, train=train, eval=eval)


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
        task: Default: guessed from the columns.
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
        one_of("task", task, get_args(Task))
    splits = read_splits(train)
    table, _ = _split(splits, train, "train")
    reason = f"task={task} was asked for."
    if task is None:
        task, reason = guess_task(table, columns, train)
    rows = rows_of_task(table, columns, task, train)
    labels = label_names(rows) if task == "classification" else ()
    if labels and len(set(values := label_values(rows))) == 1:
        raise DataError(
            f'All rows of {train} have one label, "{values[0]}"; there is nothing to tell apart. Name another '
            "column with --label."
        )
    held_out = _held_out(splits)
    if eval is not None or held_out:
        table, eval_source = read(eval) if eval else _split(splits, train, str(held_out))
        eval_rows = rows_of_task(table, columns, task, eval_source)
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
    if task == "classification":
        check_labels(eval_rows, labels, eval_source, train)
    if rows.column_names != eval_rows.column_names:
        raise DataError(
            f'Only one of {train} and {eval_source} has the column "{columns.text2}": pairs of texts and '
            "single texts are different tasks. Name the column of the second text with --text2."
        )
    pairs = "text2" in rows.column_names
    return TaskData(task, rows, eval_rows, labels, reason, eval_source, columns, pairs)


def load_rows(source: str, columns: Columns, task: Task, labels: Sequence[str], pairs: bool) -> Dataset:
    """Return rows to evaluate a trained adapter on."""
    plain, name = read(source)
    rows = rows_of_task(plain, columns, task, name, pairs=pairs)
    if task == "classification":
        check_labels(rows, labels, name, "the adapter")
    return rows


def read(source: str) -> tuple[Table, str]:
    """Read rows that are not for training: the validation split of a source, else test, else train.

    Arguments and errors are those of `read_splits`; the second value is what to call the rows in a message.
    """
    splits = read_splits(source)
    return _split(splits, source, _held_out(splits) or "train")


def _held_out(splits: dict[str, Table]) -> str | None:
    # MNLI has validation_matched
    names = [name for wanted in HELD_OUT_SPLITS for name in splits if name.split("_")[0] == wanted]
    return names[0] if names and len(splits) > 1 else None


def _split(splits: dict[str, Table], source: str, name: str) -> tuple[Table, str]:
    if len(splits) == 1:
        (name,), title = splits, source
    elif name in splits:
        title = f'split "{name}" of {source}'
    else:
        raise DataError(f'{source} has no split "{name}". Its splits: {", ".join(splits)}.')
    if not len(splits[name]):
        raise DataError(f'Split "{name}" of {source} has no rows; there is nothing to read.')
    return splits[name], title
