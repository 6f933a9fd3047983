"""The tasks of a run that trains many: where their rows are, and the rows as the model takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bank.task import check_name
from ...errors import ConfigError, DataError, near
from ..data import Columns, TaskData, encode, load_task

if TYPE_CHECKING:
    from datasets import Dataset

Tick = Callable[[int, int], None]  # tasks done, tasks in all


@dataclass(frozen=True)
class TaskSource:
    """Where a task's rows are.

    Args:
        name: Name of the task.
        train: Rows to learn from: a file, a saved folder, a hub data set or `docstrings`.
        eval: Rows to measure on; default: a split of `train`, or a tenth of its rows.
        text: Column with the text.
        text2: Column with the second text of a pair.
        label: Column with the label.
        task: classification, regression or causal-lm; default: guessed.
    """

    name: str
    train: str
    eval: str | None = None
    text: str = Columns.text
    text2: str = Columns.text2
    label: str = Columns.label
    task: str | None = None

    @property
    def columns(self) -> Columns:
        """Names of the columns."""
        return Columns(self.text, self.text2, self.label)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """A task with its rows, encoded."""

    source: TaskSource
    data: TaskData
    train: Dataset
    eval: Dataset

    @property
    def pairs(self) -> bool:
        """Whether the rows are pairs of texts."""
        return self.data.task != "causal-lm" and self.source.text2 in self.data.train.column_names


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
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--tasks {path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tasks {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--tasks {path} must hold tasks by name, for example `mail: mail.csv`.")
    return [_source(path, str(name), entry) for name, entry in content.items()]


def _source(path: Path, name: str, entry: Any) -> TaskSource:
    values = {"train": entry} if isinstance(entry, str) else entry
    known = [field.name for field in fields(TaskSource)][1:]
    if not isinstance(values, dict) or "train" not in values:
        raise ConfigError(
            f"--tasks {path}: task {name!r} names no data. Write `{name}: file`, or train: inside it."
        )
    for key in values:
        if key not in known:
            raise ConfigError(
                f"--tasks {path}: task {name!r} has {key!r}, which is not known. {near(str(key), known)}"
            )
    paths = {
        key: str(path.parent / values[key])
        for key in ("train", "eval")
        if values.get(key) is not None and (path.parent / str(values[key])).exists()
    }
    return TaskSource(check_name(name), **{**values, **paths})


def prepare(
    sources: Sequence[TaskSource], tokenizer: Any, max_length: int, seed: int, tick: Tick | None = None
) -> list[Prepared]:
    """Read and encode the rows of tasks.

    Args:
        sources: The tasks.
        tokenizer: The base model's.
        max_length: Longest text, in tokens.
        seed: Seed of the rows that are held out.
        tick: Called as tasks are done.

    Raises:
        DataError: The data of a task cannot be used; the message names the task.
        ConfigError: Tasks of a bank need one kind of model, and these are texts to learn and labels to tell.
    """
    prepared = []
    for n, source in enumerate(sources, 1):
        try:
            data = load_task(source.train, source.eval, source.columns, source.task, seed=seed)  # type: ignore[arg-type]
            rows = [
                encode(part, tokenizer, data.task, source.columns, data.labels, max_length)
                for part in (data.train, data.eval)
            ]
        except DataError as error:
            raise DataError(f"Task {source.name!r}: {error}") from error
        prepared.append(Prepared(source, data, *rows))
        if tick is not None:
            tick(n, len(sources))
    causal = [p.source.name for p in prepared if p.data.task == "causal-lm"]
    if 0 < len(causal) < len(prepared):
        raise ConfigError(
            f"Task {causal[0]!r} is causal-lm and others are not: tasks that are trained at once run on one kind of "
            "model. Say task: classification for it, or train the two kinds in banks of their own."
        )
    return prepared


def together(prepared: Sequence[Prepared]) -> Dataset:
    """Return the training rows of all tasks, one task behind the other, with the task's number in each."""
    from datasets import Value, concatenate_datasets

    kinds = {p.data.task for p in prepared}
    parts = []
    for n, p in enumerate(prepared):
        rows = p.train.add_column("task", [n] * len(p.train))
        if kinds == {"classification", "regression"}:  # one column has one type
            rows = rows.cast_column("labels", Value("float32"))
        parts.append(rows)
    return concatenate_datasets(parts)
