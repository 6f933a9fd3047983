"""One task of a bank: its numbers, its head, and what is known of it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, eq=False)
class Task:
    """What a task has of its own; everything else is in the basis and in the base model.

    Args:
        name: Any text without control characters.
        numbers: All numbers of its cores in the order of `Layout`, shape `(size,)`.
        head: Modules trained in full, by their key in an adapter's file.
        labels: Names of the classes, for classification.
        task: `"classification"`, `"regression"` or `"causal-lm"`; `None` where nobody said.
        metadata: Anything that JSON can hold.

    Raises:
        ConfigError: The name is empty or has control characters.

    Example:
        >>> import torch
        >>> Task("reviews", torch.zeros(3072), labels=("bad", "good")).numbers.shape
        torch.Size([3072])
    """

    name: str
    numbers: Tensor
    head: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    task: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> str:
    """Return the name of a task. Names are data: separators of paths, quotes and any script are allowed.

    Raises:
        ConfigError: The name is empty or stands for no task, or has control characters or half a character.

    Example:
        >>> check_name("../reviews'; DROP TABLE task")
        "../reviews'; DROP TABLE task"
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"A task cannot be called {name!r}: a name is text that is not empty.")
    if name == "__base__":
        raise ConfigError("A task cannot be called '__base__': rows of that name are rows without a task.")
    bad = [character for character in name if unicodedata.category(character) in ("Cc", "Cs")]
    if bad:
        raise ConfigError(
            f"A task cannot be called {name!r}: {bad[0]!r} is a control character or half a character, which no "
            "table could show. Leave it out."
        )
    return name
