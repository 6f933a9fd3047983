"""Labels: numbers or classes, however a file writes them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ...errors import DataError, near

# "007" is a name and stays one; 18 digits fit an int64
WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:(?:\.[0-9]{3})+,[0-9]+|(?:,[0-9]{3})+\.[0-9]+)")
LONG = re.compile(r"^[-+]?[0-9]{19,}|[eE][-+]?[0-9]{3,}")  # numbers that float64 would merge, or not hold
THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2},[0-9]{3}")


def number(value: Any) -> float:
    """Return a label as a number; NaN if it is none."""
    try:
        return float(_plain(value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _plain(text: str) -> str:
    """Return a number as Python writes it: the decimals of 1,5 and 1.234,5 stand behind the comma."""
    text = text.strip()
    if GROUPED.fullmatch(text):
        text = text.replace("." if text.rindex(",") > text.rindex(".") else ",", "")
    return text.replace(",", ".")


def numbers(values: Sequence[Any], where: str) -> list[float] | None:
    """Return labels as numbers if all of them are or, as in a CSV file, are written so; a bool is a name.

    A comma that may stand before decimals or after thousands is a DataError, which begins with `where`.
    """
    if all(type(value) in (int, float) for value in values):
        return list(values)
    if not all(isinstance(value, str) for value in values):
        return None
    texts = [value.strip() for value in values]
    if not all(NUMBER.fullmatch(_plain(text)) for text in texts) or any(map(LONG.search, texts)):
        return None
    commas = {row: text for row, text in enumerate(texts, start=1) if "," in text}
    has_points = any("." in text and "," not in text for text in texts)
    if commas and (has_points or all(map(THOUSANDS.fullmatch, commas.values()))):
        row, text = next(iter(commas.items()))
        raise DataError(
            f"{where} holds {text!r} in row {row}: with a comma before decimals, or after thousands? Write it with a "
            "point, or without a comma."
        )
    return [int(text) if WHOLE.fullmatch(text) else number(text) for text in texts]


def classes(
    values: Sequence[Any], declared: Sequence[str], where: str, labels: Sequence[str] = (), owner: str = ""
) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the classes in the order of their ids, and the id of each row's.

    1, 1.0 and "1" are one class, whatever a file made of it; two that differ in spaces or capitals alone are an error
    (DataError). Where `owner` has `labels` already, others are an error too. Else declared classes keep their order,
    and others are sorted, as numbers if all are.
    """
    as_numbers = None if declared else numbers(values, where)
    whole = [int(n) if isinstance(n, float) and n.is_integer() else n for n in as_numbers or values]
    names = [declared[n] for n in values] if declared else [str(value).strip() for value in whole]
    spelled: dict[str, tuple[int, str]] = {}
    for row, name in enumerate(() if declared else names, start=1):
        alike = " ".join(unicodedata.normalize("NFKC", name).split()).casefold()
        first, other = spelled.setdefault(alike, (row, name))
        if other != name:
            raise DataError(
                f"{where} writes {other!r} in row {first} and {name!r} in row {row}, which differ in spaces or "
                "capitals alone. Write them alike if they are one label, and else name one of them otherwise."
            )
    if unknown := sorted(set(names) - set(labels)) if labels else []:
        raise DataError(
            f"{where} has labels that {owner} does not have: {', '.join(unknown[:10])}"
            f"{', …' if len(unknown) > 10 else ''}. {near(unknown[0], labels)} "
            "Drop these rows, or train on rows that have these labels."
        )
    order: dict[str, Any] = dict(zip(names, as_numbers or names, strict=True))
    known = tuple(labels or declared or sorted(order, key=order.__getitem__))
    ids = {name: n for n, name in enumerate(known)}
    return known, [ids[name] for name in names]
