"""What a task needs of a table: which columns hold what, and what their values say about the task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...errors import DataError, near
from .conversations import CHAT, LAYOUTS, chat_columns, conversation
from .labels import classes, number, numbers
from .tables import Table

if TYPE_CHECKING:
    from datasets import Dataset

Task = Literal["classification", "regression", "causal-lm"]

SURROGATE = re.compile("[\ud800-\udfff]")
MOST_CLASSES = 64
"""Whole numbers with more distinct values than this are taken for a quantity, not for classes."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    A default name may be absent where the task can do without it; a name that the user gave must exist.

    Attributes:
        text: The text; or, as a list of turns, a conversation.
        text2: The second text of a pair.
        label: A class (text, a bool or a whole number) or a number.
    """

    text: str = "text"
    text2: str = "text2"
    label: str = "label"

    def named(self, **names: str | None) -> Columns:
        """Return these columns with other names, where one is given."""
        return replace(self, **{column: name for column, name in names.items() if name is not None})


def rows_of_task(
    table: Table,
    columns: Columns,
    task: Task,
    source: str,
    need_label: bool = True,
    pairs: bool | None = None,
) -> Dataset:
    """Return what a task needs of a table, checked, in columns of the names `text` or `messages`, `text2` and `label`.

    Args:
        table: The rows as they were read.
        columns: Names of the columns there.
        task: Only a language model takes conversations in place of texts, and no label.
        source: What to call the rows in a message.
        need_label: Whether the rows must have labels, or answers; not needed to predict.
        pairs: Whether a second text belongs to each. Default: where there is a column of it.

    Raises:
        DataError: A column is missing, or a value does not fit the task.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    if task == "causal-lm" and (chat := chat_columns(table, columns.text, need_label)):
        return Dataset.from_dict({CHAT: _conversations(table, chat, source)})
    option = f"--text, or bring conversations: {LAYOUTS}" if task == "causal-lm" else "--text"
    needed = {"text": ("text", option)}
    if pairs is None:
        pairs = columns.text2 != Columns.text2 or table.find(columns.text2) is not None
    if pairs and task != "causal-lm":
        needed["text2"] = ("text", "--text2 (the second of a pair)")
    if need_label and task != "causal-lm":
        needed["label"] = ("number" if task == "regression" else "class", "--label")
    options: dict[str, str] = {}
    content: dict[str, Sequence[Any]] = {}
    features: dict[str, Any] = {}
    for name, (kind, option) in needed.items():
        column = table.check(getattr(columns, name), option, source)
        if column in options:
            raise DataError(
                f'Column "{column}" of {source} is used twice, for {options[column]} and --{name}. Name different '
                "columns."
            )
        options[column], where = f"--{name}", f'Column "{column}" of {source}'
        content[name], features[name] = table[column], Value("string")
        declared = table.classes.get(column, ())
        what, is_valid = _KINDS["class id" if declared and kind == "class" else kind]
        _check(content[name], list(map(is_valid, content[name])), what, where)
        if kind == "class":
            names, content[name] = classes(content[name], declared, where)
            features[name] = ClassLabel(names=list(names))
        elif kind == "number":
            content[name] = numbers(content[name], where) or list(map(number, content[name]))
            features[name] = Value("float64")
    return Dataset.from_dict(content, features=Features(features))


def _conversations(table: Table, chat: dict[str, str], source: str) -> list[str]:
    values = zip(*(table[column] for column in chat.values()), strict=True)
    rows = [conversation(dict(zip(chat, row, strict=True))) for row in values]
    part, column = next(iter(chat.items()))
    what = (
        'a list of {"role": …, "content": …} or {"from": …, "value": …}' if part == "turns" else "a question"
    )
    _check(table[column], [row is not None for row in rows], what, f'Column "{column}" of {source}')
    return rows  # type: ignore[return-value]


def _check(values: Sequence[Any], valid: Sequence[bool], what: str, where: str) -> None:
    """Raise DataError if some values are not valid, with the numbers of their rows."""
    invalid = [row for row, is_valid in enumerate(valid, start=1) if not is_valid]
    if invalid:
        shown = ", ".join(map(str, invalid[:5])) + (", …" if len(invalid) > 5 else "")
        raise DataError(
            f"{where} must hold {what} in every row. {len(invalid)} of {len(values)} rows do not: {shown} (the first "
            f"row is 1; row {invalid[0]} holds {values[invalid[0] - 1]!r:.60}). Fill or drop these rows, or name "
            "another column."
        )


def _is_text(value: Any) -> bool:
    # half of a pair of surrogates, which JSON may hold, is no character
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


#: What a column must hold in every row, in words and as a test.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text that is not empty", _is_text),
    "number": ("a number (classification needs none)", lambda value: math.isfinite(number(value))),
    "class": ("one label", lambda v: _is_text(v) or (isinstance(v, int | float) and math.isfinite(v))),
    # a test split of the hub that hides its labels has -1
    "class id": ("one label", lambda value: value is not None and value >= 0),
}


def label_names(rows: Dataset) -> tuple[str, ...]:
    """Return the classes of a task's rows in the order of their ids."""
    return tuple(rows.features["label"].names)


def label_values(rows: Dataset) -> list[str]:
    """Return the class of each of a task's rows by name."""
    names = label_names(rows)
    return [names[n] for n in rows["label"][:]]


def check_labels(rows: Dataset, labels: Sequence[str], source: str, owner: str) -> None:
    """Raise DataError if a row has a label that is none of the classes of `owner`."""
    unknown = sorted(set(label_values(rows)) - set(labels))
    if unknown:
        raise DataError(
            f"{source} has labels that {owner} does not have: {', '.join(unknown[:10])}"
            f"{', …' if len(unknown) > 10 else ''}. {near(unknown[0], labels)} "
            "Drop these rows, or train on rows that have these labels."
        )


def guess_task(table: Table, columns: Columns, source: str) -> tuple[Task, str]:
    """Return the task that columns and values suggest, and one sentence why; DataError where none is clear."""
    column, chat = table.find(columns.label), chat_columns(table, columns.text)
    if "turns" in chat or (chat and column is None):
        names = ", ".join(f'"{name}"' for name in chat.values())
        return "causal-lm", f"Conversations are in {names}: learn to answer."
    if column is None:
        # a label column that was named but is missing must not turn the task into another
        if columns.label != Columns.label:
            table.check(columns.label, "--label", source)
        return "causal-lm", (
            f'There is no column "{columns.label}" (only {table.described()}; --label names it): learn the text itself.'
        )
    values, declared = table[column], table.classes.get(column, ())
    as_numbers = None if declared else numbers(values, f'Column "{column}" of {source}')
    labels = declared or {str(value).strip() for value in as_numbers or values}
    if as_numbers and any(math.isfinite(value) and value != int(value) for value in as_numbers):
        return "regression", f'The column "{column}" holds numbers with fractions.'
    why = f'The column "{column}" holds names: {len(labels)} classes'
    if as_numbers:
        why = f'The column "{column}" holds {len(labels)} different whole numbers'
        if len(labels) > MOST_CLASSES:
            return "regression", f"{why}, more than the {MOST_CLASSES} that are taken for classes."
    is_rare = len(labels) == len(values) > 2 or (len(labels) > MOST_CLASSES and 2 * len(labels) > len(values))
    if is_rare and not declared:
        raise DataError(
            f'Column "{column}" of {source} holds {len(labels):,} different labels in {len(values):,} rows (row 1: '
            f"{values[0]!r:.60}), too many to tell apart. Name the column of the labels with --label, or say what to "
            "learn with --task: classification, regression, or causal-lm for the text."
        )
    return "classification", f"{why}."
