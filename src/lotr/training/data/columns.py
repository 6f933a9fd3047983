"""Which columns hold what, and what their values say about the task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ...errors import ConfigError, DataError, near

if TYPE_CHECKING:
    from datasets import Dataset

Task = Literal["classification", "regression", "causal-lm"]

MOST_CLASSES = 64
"""Whole numbers with more distinct values than this are taken for a quantity, not for classes."""

CHAT = "messages"

# "007" is a name and stays one; 18 digits fit an int64
WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    A default name may be absent where the task can do without it; a name that the user gave must exist.

    Attributes:
        text: The text; or, as a list of {"role", "content"}, a conversation.
        text2: The second text of a pair.
        label: A class (text, a bool or a whole number) or a number.
    """

    text: str = "text"
    text2: str = "text2"
    label: str = "label"

    def named(self, **names: str | None) -> Columns:
        """Return these columns with other names, where one is given."""
        return replace(self, **{column: name for column, name in names.items() if name is not None})


def check_task(task: str) -> None:
    """Raise ConfigError if there is no such task."""
    if task not in get_args(Task):
        raise ConfigError(f"task={task!r} is not known. {near(task, get_args(Task))}")


def chat_column(rows: Dataset, columns: Columns) -> str | None:
    """Return the column of conversations: `messages`, or the text column that the user named."""
    for name in (CHAT, columns.text) if columns.text == Columns.text else (columns.text,):
        if name in rows.column_names and isinstance(rows[0][name], list):
            return name
    return None


def rows_of_task(
    rows: Dataset,
    columns: Columns,
    task: Task,
    source: str,
    need_label: bool = True,
    pairs: bool | None = None,
) -> Dataset:
    """Return what a task needs of rows: columns of the names `text` or `messages`, `text2` and `label`.

    Args:
        rows: The rows as they were read.
        columns: Names of the columns there.
        task: Only a language model takes conversations in place of texts, and no label.
        source: What to call the rows in a message.
        need_label: Whether the rows must have labels; not needed to predict.
        pairs: Whether a second text belongs to each. Default: where there is a column of it.

    Raises:
        DataError: A column is missing, or a value does not fit the task.
    """
    chat = chat_column(rows, columns) if task == "causal-lm" else None
    needed = {CHAT: (chat, "chat")} if chat else {"text": (columns.text, "text")}
    if pairs is None:
        pairs = columns.text2 != Columns.text2 or columns.text2 in rows.column_names
    if pairs and task != "causal-lm":
        needed["text2"] = (columns.text2, "text")
    if need_label and task == "regression":
        needed["label"] = (columns.label, "number")
    elif need_label and task == "classification":
        needed["label"] = (columns.label, "class id" if _declared_names(rows, columns.label) else "class")
    names: dict[str, str] = {}
    for name, (column, kind) in needed.items():
        option = _OPTIONS[name]
        if column in names:
            raise DataError(
                f'Column "{column}" of {source} is used twice, for {_OPTIONS[names[column]]} and {option}. Name '
                "different columns."
            )
        names[column] = name
        check_column(rows, column, option, source)
        values = rows[column][:]
        what, is_valid = _KINDS[kind]
        invalid = [n for n, value in enumerate(values, start=1) if not is_valid(value)]
        if invalid:
            numbers = ", ".join(map(str, invalid[:5])) + (", …" if len(invalid) > 5 else "")
            raise DataError(
                f'Column "{column}" of {source} must hold {what} in every row. {len(invalid)} of {len(values)} '
                f"rows do not: {numbers} (the first row is 1; row {invalid[0]} holds "
                f"{values[invalid[0] - 1]!r:.60}). Fill or drop these rows, or name another column."
            )
    return rows.select_columns(list(names)).rename_columns(names)


def check_column(rows: Dataset, name: str, option: str, source: str) -> None:
    """Raise DataError if there is no such column; `option` is how the user names it."""
    if name not in rows.column_names:
        raise DataError(
            f'{source} has no column "{name}"; its columns are: {", ".join(rows.column_names)}. '
            f"Name the right one with {option}."
        )


def check_labels(rows: Dataset, labels: Sequence[str], source: str, owner: str) -> None:
    """Raise DataError if a row has a label that is none of the classes of `owner`."""
    unknown = sorted(set(label_values(rows)) - set(labels))
    if unknown:
        raise DataError(
            f"{source} has labels that {owner} does not have: {', '.join(unknown[:10])}"
            f"{', …' if len(unknown) > 10 else ''}. {near(unknown[0], labels)} "
            "Drop these rows, or train on rows that have these labels."
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_class(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int | float) and math.isfinite(value))


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("role")) and "content" in value


_OPTIONS = {CHAT: "--text", "text": "--text", "text2": "--text2 (the second of a pair)", "label": "--label"}

#: What a column must hold in every row, in words and as a test.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text that is not empty", _is_text),
    "chat": ('a list of {"role": …, "content": …}', lambda turns: bool(turns) and all(map(_is_turn, turns))),
    "number": ("a number (classification needs none)", _is_number),
    "class": ("one label", _is_class),
    # a test split of the hub that hides its labels has -1
    "class id": ("one label", lambda value: value is not None and value >= 0),
}


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """Return labels as numbers if all of them are or, as in a CSV file, are written so; a bool is a name."""
    if all(type(value) in (int, float) for value in values):
        return list(values)
    if not all(isinstance(value, str) and NUMBER.fullmatch(value) for value in values):
        return None
    return [int(value) if WHOLE.fullmatch(value) else float(value) for value in values]


def label_values(rows: Dataset, label: str = "label") -> list[str]:
    """Return the class of each row by name; 1, 1.0 and "1" are one class, whatever a file made of it."""
    values = rows[label][:]
    if declared := _declared_names(rows, label):
        return [declared[value] for value in values]
    return [
        str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in _numbers(values) or values
    ]


def label_names(rows: Dataset) -> tuple[str, ...]:
    """Return the classes in the order of their ids: as a `ClassLabel` column declares them, else sorted.

    Example:
        >>> from datasets import Dataset
        >>> label_names(Dataset.from_dict({"label": [10, 9, 10]}))
        ('9', '10')
    """
    names = sorted(set(label_values(rows)))
    if numbers := _numbers(names):
        names = [name for _, name in sorted(zip(numbers, names, strict=True))]
    return _declared_names(rows) or tuple(names)


def _declared_names(rows: Dataset, label: str = "label") -> tuple[str, ...]:
    return tuple(getattr(rows.features.get(label), "names", ()))


def guess_task(rows: Dataset, columns: Columns) -> tuple[Task, str]:
    """Return the task that the columns and their values suggest, and one sentence why."""
    label = f'column "{columns.label}"'
    if chat := chat_column(rows, columns):
        return "causal-lm", f'Column "{chat}" holds conversations: learn to answer.'
    if columns.label not in rows.column_names:
        others = ", ".join(rows.column_names)
        return "causal-lm", f"There is no {label} (only {others}; --label names it): learn the text itself."
    declared = _declared_names(rows, columns.label)
    numbers = None if declared else _numbers(rows[columns.label][:])
    if numbers is None:
        names = declared or set(label_values(rows, columns.label))
        return "classification", f"The {label} holds names: {len(names)} classes."
    if any(math.isfinite(value) and value != int(value) for value in numbers):
        return "regression", f"The {label} holds numbers with fractions."
    n_values = len(set(numbers))
    why = f"The {label} holds {n_values} different whole numbers"
    if n_values > MOST_CLASSES:
        return "regression", f"{why}, more than the {MOST_CLASSES} that are taken for classes."
    return "classification", f"{why}."
