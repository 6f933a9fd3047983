"""The tasks of a run that trains many: where their rows are, and the rows as the model takes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bank.task import check_name
from ...errors import ConfigError, DataError
from ..data import Columns, TaskData, load_task
from ..settings import load_yaml, typed

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TaskSource:
    """Where a task's rows are, and what is in them."""

    name: str
    train: str  # a file, a saved folder, a hub data set or `docstrings`
    eval: str | None = None  # default: a split of `train`, or a tenth of its rows
    text: str = Columns.text
    text2: str = Columns.text2
    label: str = Columns.label
    task: str | None = None  # default: guessed

    @property
    def columns(self) -> Columns:
        """Names of the columns."""
        return Columns(self.text, self.text2, self.label)


def read_tasks(path: Path) -> list[TaskSource]:
    r"""Read a list of tasks from YAML: `name: file`, or `name: {train: file, eval: …, text: …, label: …, task: …}`.

    Paths are relative to the list's folder.

    Raises:
        ConfigError: The file is missing, is no such list, or names a setting that does not exist.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tasks.yaml"
        >>> _ = path.write_text("mail: mail.csv\nnews: {train: news.csv, label: topic}\n")
        >>> [(task.name, task.label) for task in read_tasks(path)]
        [('mail', 'label'), ('news', 'topic')]
    """
    content = load_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path} must hold tasks by name, for example `mail: mail.csv`.")
    sources = []
    for name, entry in content.items():
        where = f"{path}: task {str(name)!r}"
        values = typed(TaskSource, entry if isinstance(entry, dict) else {"train": entry}, where)
        if "train" not in values:
            raise ConfigError(f"{where} names no data. Write `{name}: file`, or train: inside it.")
        for key in ("train", "eval"):
            beside = path.parent / str(values.get(key))
            if key in values and os.path.exists(beside):  # noqa: PTH110 – pathlib raises for a long name
                values[key] = str(beside)
        sources.append(TaskSource(**values | {"name": check_name(str(name))}))
    return sources


def prepare(sources: Iterable[TaskSource], tokenizer: Any, max_length: int, seed: int) -> dict[str, TaskData]:
    """Read and encode the rows of tasks, all for one kind of model; `seed` is that of the rows that are held out.

    Data that cannot be used is a DataError that names the task.
    """
    prepared: dict[str, TaskData] = {}
    for source in sources:
        if source.name in prepared:
            raise ConfigError(f"Two tasks are called {source.name!r}. Give one of them another name.")
        try:
            data = load_task(source.train, source.eval, source.columns, source.task, seed=seed)  # type: ignore[arg-type]
            prepared[source.name] = data.encoded(tokenizer, max_length=max_length)
        except DataError as error:
            raise DataError(f"Task {source.name!r}: {error}") from error
    causal = [name for name, data in prepared.items() if data.task.task == "causal-lm"]
    if 0 < len(causal) < len(prepared):
        raise ConfigError(
            f"Task {causal[0]!r} is causal-lm and others are not: tasks that are trained at once run on one kind of "
            "model. Say task: classification for it, or train the two kinds in banks of their own."
        )
    return prepared


def together(parts: Sequence[Dataset]) -> Dataset:
    """Return the encoded rows of all tasks, one task behind the other, with the task's number in `task`."""
    from datasets import Value, concatenate_datasets

    numbered = [part.add_column("task", [n] * len(part)) for n, part in enumerate(parts)]
    kinds = {str(part.features.get("labels")) for part in parts}
    if len(kinds) > 1:  # classes beside numbers, and one column has one type
        numbered = [part.cast_column("labels", Value("float32")) for part in numbered]
    return concatenate_datasets(numbered)
