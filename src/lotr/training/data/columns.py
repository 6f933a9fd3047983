"""What an adapter is trained for, and what that needs of a table: which columns hold what, and what values say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ...errors import CheckpointError, DataError
from .conversations import CHAT, LAYOUTS, chat_columns, conversation
from .labels import classes, number, numbers
from .tables import SURROGATE, Table

Task = Literal["classification", "regression", "causal-lm"]

#: Tokens of a text, where nothing else is said.
TEXT_LENGTH = 128
#: Whole numbers with more distinct values than this are taken for a quantity, not for classes.
MOST_CLASSES = 64


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


@dataclass(frozen=True)
class TaskRecord:
    """What an adapter is trained for, beside its numbers: content of `task.json`."""

    task: Task
    labels: tuple[str, ...] = ()  # classes in the order of their ids, of a classification
    max_length: int = TEXT_LENGTH  # 0 where nobody said: as the model takes
    columns: Columns = Columns()
    base_model: str = ""
    pairs: bool | None = False  # of texts; `None` where a column of second texts tells
    method: str = "lotr"
    dtype: str = "float32"
    base_fingerprint: str | None = None
    load_in: str | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TaskRecord:
        """Read the content of `task.json`; CheckpointError where a field is missing, or is not what it should be."""
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        try:
            lists = {
                "labels": tuple(map(str, known["labels"])),
                "columns": Columns(**known.get("columns", {})),
            }
            record = cls(**{"max_length": 0} | known | lists)
            is_whole = record.task in get_args(Task) and type(record.max_length) is int
        except (KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise CheckpointError(
                "task.json is damaged: its task or labels are missing, or a field is not what it should be. Copy or "
                "download the adapter again."
            )
        return record


def rows_of_task(
    table: Table, task: TaskRecord, need_label: bool = True, owner: str = "the adapter"
) -> Table:
    """Return what a task needs of a table, checked: `messages`, or `text`, `text2` and `label`, a number or class id.

    Args:
        table: The rows as they were read.
        task: Only a language model takes conversations in place of texts, and no label. Where it has labels already,
            those of the rows must be among them.
        need_label: Whether the rows must have labels, or answers; not needed to predict.
        owner: Who has the labels, for a message.

    Raises:
        DataError: A column is missing, or a value does not fit the task.
    """
    columns, causal, pairs = task.columns, task.task == "causal-lm", task.pairs
    if causal and (chat := chat_columns(table, columns.text, need_label)):
        return Table({CHAT: _conversations(table, chat)}, name=table.name)
    needed = {"text": ("text", f"--text, or bring conversations: {LAYOUTS}" if causal else "--text")}
    if pairs is None:
        pairs = columns.text2 != Columns.text2 or table.find(columns.text2) is not None
    if pairs and not causal:
        needed["text2"] = ("text", "--text2 (the second of a pair)")
    if need_label and not causal:
        needed["label"] = ("number" if task.task == "regression" else "class", "--label")
    options: dict[str, str] = {}
    content: dict[str, Sequence[Any]] = {}
    labels: tuple[str, ...] = ()
    for name, (kind, option) in needed.items():
        column = table.check(getattr(columns, name), option)
        where = f'Column "{column}" of {table.name}'
        if column in options:
            raise DataError(
                f"{where} is used twice, for {options[column]} and --{name}. Name different columns."
            )
        options[column], values = f"--{name}", table[column]
        declared = table.classes.get(column, ())
        what, is_valid = _KINDS[kind]
        if declared and kind == "class":  # ids; a test split of the hub that hides its labels has -1
            valid = [value is not None and 0 <= value < len(declared) for value in values]
        else:
            valid = list(map(is_valid, values))
        _check(values, valid, what, where)
        if kind == "class":
            labels, values = classes(values, declared, where, task.labels, owner)
        elif kind == "number":
            values = list(map(float, numbers(values, where) or map(number, values)))
        content[name] = values
    return Table(content, {"label": labels}, table.name)


def _conversations(table: Table, chat: dict[str, str]) -> list[Any]:
    values = zip(*(table[column] for column in chat.values()), strict=True)
    rows = [conversation(dict(zip(chat, row, strict=True))) for row in values]
    part, column = next(iter(chat.items()))
    what = (
        'a list of {"role": …, "content": …} or {"from": …, "value": …}' if part == "turns" else "a question"
    )
    _check(table[column], [row is not None for row in rows], what, f'Column "{column}" of {table.name}')
    return rows


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
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


#: What a column must hold in every row, in words and as a test.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text that is not empty", _is_text),
    "number": ("a number (classification needs none)", lambda value: math.isfinite(number(value))),
    "class": (
        "one label",
        lambda v: _is_text(v) or (isinstance(v, int | float) and math.isfinite(number(v))),
    ),
}


def guess_task(table: Table, columns: Columns) -> tuple[Task, str]:
    """Return the task that columns and values suggest, and one sentence why; DataError where none is clear."""
    column, chat = table.find(columns.label), chat_columns(table, columns.text)
    if "turns" in chat or (chat and column is None):
        names = ", ".join(f'"{name}"' for name in chat.values())
        return "causal-lm", f"Conversations are in {names}: learn to answer."
    if column is None:
        # a label column that was named but is missing must not turn the task into another
        if columns.label != Columns.label:
            table.check(columns.label, "--label")
        return "causal-lm", (
            f'There is no column "{columns.label}" (only {table.described()}; --label names it): learn the text itself.'
        )
    values, declared = table[column], table.classes.get(column, ())
    as_numbers = None if declared else numbers(values, f'Column "{column}" of {table.name}')
    labels = declared or {str(value).strip() for value in as_numbers or values}
    if as_numbers and any(math.isfinite(number(value)) and value != int(value) for value in as_numbers):
        return "regression", f'The column "{column}" holds numbers with fractions.'
    why = f'The column "{column}" holds names: {len(labels)} classes'
    if as_numbers:
        why = f'The column "{column}" holds {len(labels)} different whole numbers'
        if len(labels) > MOST_CLASSES:
            return "regression", f"{why}, more than the {MOST_CLASSES} that are taken for classes."
    is_rare = len(labels) == len(values) > 2 or (len(labels) > MOST_CLASSES and 2 * len(labels) > len(values))
    if is_rare and not declared:
        raise DataError(
            f'Column "{column}" of {table.name} holds {len(labels):,} different labels in {len(values):,} rows (row '
            f"1: {values[0]!r:.60}), too many to tell apart. Name the column of the labels with --label, or say what "
            "to learn with --task: classification, regression, or causal-lm for the text."
        )
    return "classification", f"{why}."
