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


def chat_column(dataset: Dataset, columns: Columns) -> str | None:
    """Return the column of conversations: `messages`, or the text column that the user named."""
    for name in (CHAT, columns.text) if columns.text == Columns.text else (columns.text,):
        if name in dataset.column_names and isinstance(dataset[0][name], list):
            return name
    return None


def check_columns(
    dataset: Dataset, columns: Columns, need_label: bool, source: str, chat: bool = False
) -> None:
    """Check that the columns exist and that no text and no label is missing in any row.

    Args:
        dataset: The rows.
        columns: Names of the columns.
        need_label: Whether the label column is needed.
        source: What to call the rows in a message.
        chat: Whether a column of conversations will do in place of texts.

    Raises:
        DataError: A column or a value is missing, or a text is no text.
    """
    conversations = chat_column(dataset, columns) if chat else None
    texts = [] if conversations else [("--text", columns.text)]
    if columns.text2 != Columns.text2 or (not chat and columns.text2 in dataset.column_names):
        texts.append(("--text2", columns.text2))
    for option, name in [*texts, *([("--label", columns.label)] if need_label else [])]:
        if name not in dataset.column_names:
            raise DataError(
                f'{source} has no column "{name}"; its columns are: {", ".join(dataset.column_names)}. '
                f"Name the right one with {option}."
            )
    for _, name in texts:
        _all(_is_text, dataset, name, source, "a text that is not empty")
    if conversations:
        _all(_is_conversation, dataset, conversations, source, 'a list of {"role": …, "content": …}')
    if need_label:
        hidden = -1 if _class_names(dataset, columns) else None
        _all(lambda v: _is_label(v) and v != hidden, dataset, columns.label, source, "one label")


def _all(holds: Callable[[Any], bool], dataset: Dataset, name: str, source: str, what: str) -> None:
    values = dataset[name][:]
    bad = [index for index, value in enumerate(values) if not holds(value)]
    if bad:
        rows = ", ".join(str(index + 1) for index in bad[:5]) + (", …" if len(bad) > 5 else "")
        raise DataError(
            f'Column "{name}" of {source} must hold {what} in every row. {len(bad)} of {len(values)} rows do '
            f"not: {rows} (the first row is 1; it holds {_short(values[bad[0]])} in row {bad[0] + 1}). "
            "Fill or drop these rows, or name another column."
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_label(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int | float) and math.isfinite(value))


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and turn.get("role") and "content" in turn for turn in value)
    )


def label_values(dataset: Dataset, columns: Columns) -> list[str]:
    """Return the class of each row by name; 1, 1.0 and "1" are one class, whatever a file made of it."""
    names = _class_names(dataset, columns)
    return [names[value] if names else _label_name(value) for value in dataset[columns.label][:]]


def label_names(dataset: Dataset, columns: Columns) -> tuple[str, ...]:
    """Return the names of the classes in the order of their ids.

    Args:
        dataset: Rows with labels.
        columns: Names of the columns.

    Returns:
        The names that a `ClassLabel` column declares; else those that occur, sorted as numbers if all are.

    Example:
        >>> from datasets import Dataset
        >>> label_names(Dataset.from_dict({"label": [10, 9, 10]}), Columns())
        ('9', '10')
    """
    declared = _class_names(dataset, columns)
    if declared:
        return declared
    names = sorted(set(label_values(dataset, columns)))
    return tuple(names if any(to_number(name) is None for name in names) else sorted(names, key=float))


def guess_task(dataset: Dataset, columns: Columns) -> tuple[Task, str]:
    """Guess the task from the columns and their values.

    Args:
        dataset: The rows.
        columns: Names of the columns.

    Returns:
        The task and one sentence why.
    """
    label = f'column "{columns.label}"'
    conversations = chat_column(dataset, columns)
    if conversations:
        return "causal-lm", f'Column "{conversations}" holds conversations: learn to answer.'
    if columns.label not in dataset.column_names:
        others = ", ".join(dataset.column_names)
        return "causal-lm", f"There is no {label} (only {others}; --label names it): learn the text itself."
    values = dataset[columns.label][:]
    names = _class_names(dataset, columns)
    if names or not all(type(value) in (int, float) for value in values):
        n_classes = len(names or set(label_values(dataset, columns)))
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


def check_classes(dataset: Dataset, columns: Columns, labels: Sequence[str], source: str, known: str) -> None:
    """Raise DataError if a row's class is not among `labels`, which `known` has."""
    unknown = sorted(set(label_values(dataset, columns)) - set(labels))
    if unknown:
        raise DataError(
            f"{source} has labels that {known} does not have: {', '.join(unknown[:10])}"
            f"{', …' if len(unknown) > 10 else ''}. {near(unknown[0], labels)} "
            "Drop these rows, or train on rows that have these labels."
        )


def check_numbers(dataset: Dataset, columns: Columns, source: str) -> None:
    """Raise DataError if a label is no number."""
    for row, value in enumerate(dataset[columns.label][:], start=1):
        if to_number(value) is None:
            raise DataError(
                f'{source}, row {row}: the label {_short(value)} in column "{columns.label}" is not a number; '
                "regression needs numbers. Mend the row, or ask for task classification."
            )


def to_number(value: Any) -> float | None:
    """Return the finite number that a label stands for, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _label_name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _class_names(dataset: Dataset, columns: Columns) -> tuple[str, ...]:
    from datasets import ClassLabel

    feature = dataset.features.get(columns.label)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()
