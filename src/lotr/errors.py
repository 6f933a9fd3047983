"""Every error that the library raises on purpose.

A message names the law, the offender, the context and the way out. Each class is also a child of
the built-in exception that PEFT or Python would raise in its place, so `except ValueError` works.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LotrError(Exception):
    """Base of all errors of this library."""


class ConfigError(LotrError, ValueError):
    """A setting has no meaning, alone or beside another."""


class PlanError(LotrError, ValueError):
    """The sites of a model cannot share what was asked for."""


class CheckpointError(LotrError, RuntimeError):
    """Something on disk is missing, damaged or belongs to something else."""


class DataError(LotrError, ValueError):
    """A data set cannot be used as asked."""


class UnknownTaskError(LotrError, LookupError):
    """A bank has no task of that name."""


class TrainingError(LotrError, RuntimeError):
    """Training had to stop."""


class Interrupted(LotrError):
    """The user stopped a run; a checkpoint is there to go on from."""


def near(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known names nearest to `name`, or with all of them when they are few.

    Args:
        name: What was asked for.
        known: What exists.

    Returns:
        One sentence, ready to end an error message.

    Example:
        >>> near("querry", ["query", "key", "value", "dense", "up", "down"])
        'Near matches: query.'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    if close:
        return f"Near matches: {', '.join(close)}."
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"Known: {shown}." if names else "There are no others."
