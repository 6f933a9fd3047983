"""Which columns hold what, and what their values say about the task."""

from __future__ import annotations

import math
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


def check_rows(
    rows: Dataset,
    columns: Columns,
    task: Task,
    source: str,
    labels: Sequence[str] | None = None,
    owner: str = "the model",
    need_label: bool = True,
) -> None:
    """Check that the columns exist and that every row has what the task needs.

    Args:
        rows: The rows.
        columns: Names of the columns.
        task: What is learned. Only a language model takes conversations in place of texts, and no label.
        source: What to call the rows in a message.
        labels: The classes there are; default: any.
        owner: What to call in a message that which has these classes.
        need_label: Whether the rows must have labels; not needed to predict.

    Raises:
        DataError: A column or a value is missing, or a value does not fit the task.
    """
    conversations = chat_column(rows, columns) if task == "causal-lm" else None
    checks = [("--text", columns.text, _is_text, "a text that is not empty")]
    if conversations:
        checks = [("--text", conversations, _is_conversation, 'a list of {"role": …, "content": …}')]
    if columns.text2 != Columns.text2 or (task != "causal-lm" and columns.text2 in rows.column_names):
        checks.append(("--text2", columns.text2, _is_text, "a text that is not empty"))
    if need_label and task == "regression":
        checks.append(("--label", columns.label, _is_number, "a number (classification needs none)"))
    elif need_label and task == "classification":
        # a test split of the hub that hides its labels has -1
        is_label = _is_declared if _declared_names(rows, columns) else _is_label
        checks.append(("--label", columns.label, is_label, "one label"))
    used = [name for _, name, *_ in checks]
    if len(set(used)) < len(used):
        twice = max(used, key=used.count)
        raise DataError(
            f'Column "{twice}" of {source} is used twice, for {" and ".join(c[0] for c in checks if c[1] == twice)}. '
            "Name different columns."
        )
    for option, name, is_valid, what in checks:
        check_column(rows, name, option, source)
        _check_values(rows, name, source, is_valid, what)
    if need_label and task == "classification" and labels is not None:
        unknown = sorted(set(label_values(rows, columns)) - set(labels))
        if unknown:
            raise DataError(
                f"{source} has labels that {owner} does not have: {', '.join(unknown[:10])}"
                f"{', …' if len(unknown) > 10 else ''}. {near(unknown[0], labels)} "
                "Drop these rows, or train on rows that have these labels."
            )


def check_column(rows: Dataset, name: str, option: str, source: str) -> None:
    """Raise DataError if there is no such column; `option` is how the user names it."""
    if name not in rows.column_names:
        raise DataError(
            f'{source} has no column "{name}"; its columns are: {", ".join(rows.column_names)}. '
            f"Name the right one with {option}."
        )


def _check_values(rows: Dataset, name: str, source: str, is_valid: Callable[[Any], bool], what: str) -> None:
    values = rows[name][:]
    invalid = [n for n, value in enumerate(values, start=1) if not is_valid(value)]
    if invalid:
        numbers = ", ".join(map(str, invalid[:5])) + (", …" if len(invalid) > 5 else "")
        raise DataError(
            f'Column "{name}" of {source} must hold {what} in every row. {len(invalid)} of {len(values)} rows '
            f"do not: {numbers} (the first row is 1; row {invalid[0]} holds {values[invalid[0] - 1]!r:.60}). "
            "Fill or drop these rows, or name another column."
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_label(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int | float) and math.isfinite(value))


def _is_declared(value: Any) -> bool:
    return value is not None and value >= 0


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and turn.get("role") and "content" in turn for turn in value)
    )


def label_values(rows: Dataset, columns: Columns) -> list[str]:
    """Return the class of each row by name; 1, 1.0 and "1" are one class, whatever a file made of it."""
    declared = _declared_names(rows, columns)
    values = rows[columns.label][:]
    if declared:
        return [declared[value] for value in values]
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]


def label_names(rows: Dataset, columns: Columns) -> tuple[str, ...]:
    """Return the names of the classes in the order of their ids.

    Returns:
        The names that a `ClassLabel` column declares; else those that occur, sorted as numbers if all are.

    Example:
        >>> from datasets import Dataset
        >>> label_names(Dataset.from_dict({"label": [10, 9, 10]}), Columns())
        ('9', '10')
    """
    names = set(label_values(rows, columns))
    are_numbers = all(map(_is_number, names))
    return _declared_names(rows, columns) or tuple(sorted(names, key=float if are_numbers else None))


def _declared_names(rows: Dataset, columns: Columns) -> tuple[str, ...]:
    from datasets import ClassLabel

    feature = rows.features.get(columns.label)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def guess_task(rows: Dataset, columns: Columns) -> tuple[Task, str]:
    """Guess the task from the columns and their values.

    Returns:
        The task and one sentence why.
    """
    label = f'column "{columns.label}"'
    conversations = chat_column(rows, columns)
    if conversations:
        return "causal-lm", f'Column "{conversations}" holds conversations: learn to answer.'
    if columns.label not in rows.column_names:
        others = ", ".join(rows.column_names)
        return "causal-lm", f"There is no {label} (only {others}; --label names it): learn the text itself."
    values = rows[columns.label][:]
    names = _declared_names(rows, columns)
    if names or not all(type(value) in (int, float) for value in values):
        n_classes = len(names or set(label_values(rows, columns)))
        return "classification", f"The {label} holds names: {n_classes} classes."
    if any(math.isfinite(value) and value != int(value) for value in values):
        return "regression", f"The {label} holds numbers with fractions."
    n_values = len(set(values))
    if n_values > MOST_CLASSES:
        return "regression", (
            f"The {label} holds {n_values} different whole numbers, more than the {MOST_CLASSES} that "
            "are taken for classes."
        )
    return "classification", f"The {label} holds {n_values} different whole numbers."
