"""Rows from files, folders, the Hugging Face hub and the built-in set; and what is learned from which of them."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ...errors import DataError, near
from ...tuner.checks import one_of
from .columns import Columns, Task, TaskRecord, guess_task, rows_of_task
from .conversations import CHAT
from .encode import encode
from .files import READERS, read_table
from .tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "docstrings"
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
SPLITS = ("train", "training", *HELD_OUT_SPLITS)
HELD_OUT_PART = 0.1


@dataclass(frozen=True)
class TaskData:
    """All that a training run needs to know about its data."""

    task: TaskRecord
    train: Any  # a table; a `Dataset` once encoded
    eval: Any
    reason: str  # why it is this task, in one sentence
    eval_source: str  # where the rows to evaluate on come from

    @property
    def sizes(self) -> dict[str, int]:
        """Rows to train on, and to evaluate on."""
        return {"train": len(self.train), "eval": len(self.eval)}

    def encoded(self, tokenizer: PreTrainedTokenizerBase, **known: Any) -> TaskData:
        """Return the same with its rows as the model takes them, and with more that is known of the task."""
        task = replace(self.task, **known)
        train, eval = (encode(part, tokenizer, task) for part in (self.train, self.eval))
        return replace(self, task=task, train=train, eval=eval)


def load_task(
    train: str,
    eval: str | None = None,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    task: Task | None = None,
    seed: int = 0,
) -> TaskData:
    """Read the rows of a training run, find out the task, and check that both parts fit it.

    Args:
        train: Source of the rows to learn from, see `read_splits`.
        eval: Source of the rows to measure on. Default: the validation (else test) split of `train`; where
            it has neither, a tenth of its rows, drawn by a seeded shuffle.
        columns: Names of the columns.
        task: Default: guessed from the columns.
        seed: Seed of that shuffle.

    Raises:
        ConfigError: `task` is unknown.
        DataError: A source cannot be read, a column is missing, or values do not fit the task.

    Example:
        >>> data = load_task("docstrings")
        >>> data.task.task, len(data.task.labels)
        ('classification', 16)
    """
    if task is not None:
        one_of("task", task, get_args(Task))
    splits = read_splits(train)
    table = split(splits, train, "train")
    kind, reason = (task, f"task={task} was asked for.") if task else guess_task(table, columns)
    record = TaskRecord(kind, columns=columns, pairs=None)
    rows = rows_of_task(table, record)
    labels = rows.classes.get("label", ())
    if labels and len(ids := set(rows["label"])) == 1:
        raise DataError(
            f'All rows of {train} have one label, "{labels[ids.pop()]}"; there is nothing to tell apart. Name another '
            "column with --label."
        )
    record = replace(record, labels=labels)
    other = held_out(splits)
    if eval is not None or other:
        measured = rows_of_task(read(eval) if eval else split(splits, train, str(other)), record, owner=train)
    else:
        n_rows = len(rows)
        n_held_out = max(1, round(n_rows * HELD_OUT_PART))
        if n_held_out == n_rows:
            raise DataError(
                f"{train} has 1 rows, which would be held out: none is left to learn from. Add rows, or name "
                "others to measure on with --eval."
            )
        order = random.Random(seed).sample(range(n_rows), n_rows)
        name = f"{n_held_out} of the {n_rows} rows of {train}, held out by a shuffle, seed {seed}"
        measured = replace(rows.take(sorted(order[:n_held_out])), name=name)
        rows = rows.take(sorted(order[n_held_out:]))
        reason += f" Measured on {name}."
    if CHAT in rows.columns.keys() ^ measured.columns.keys():
        raise DataError(
            f"Only one of {train} and {measured.name} has conversations: texts and conversations are different tasks."
        )
    if rows.columns.keys() != measured.columns.keys():
        raise DataError(
            f'Only one of {train} and {measured.name} has the column "{columns.text2}": pairs of texts and '
            "single texts are different tasks. Name the column of the second text with --text2."
        )
    record = replace(record, pairs="text2" in rows.columns)
    return TaskData(record, rows, measured, reason, measured.name)


def read(source: str) -> Table:
    """Read rows that are not for training: the validation split of a source, else test, else train.

    Arguments and errors are those of `read_splits`.
    """
    splits = read_splits(source)
    return split(splits, source, held_out(splits) or "train")


def held_out(splits: Mapping[str, Table]) -> str | None:
    """Return the split to measure on, where there is one beside that to learn from."""
    # MNLI has validation_matched
    names = [name for wanted in HELD_OUT_SPLITS for name in splits if name.split("_")[0] == wanted]
    return names[0] if names and len(splits) > 1 else None


def split(splits: Mapping[str, Table], source: str, name: str) -> Table:
    """Return a split by its name, or the only one; DataError where it is missing or empty."""
    table = next(iter(splits.values())) if len(splits) == 1 else splits.get(name)
    if table is None:
        raise DataError(f'{source} has no split "{name}". Its splits: {", ".join(splits)}.')
    if not len(table):
        raise DataError(f"There is nothing to read: {table.name} has no rows.")
    return table


def read_splits(source: str) -> dict[str, Table]:
    """Read all splits of a data source; a file is one split, "train".

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .parquet, or .txt with a text a line), a folder with files of the
            names train, dev and test, or written by `save_to_disk`, the word `docstrings`, or a set on the Hugging
            Face hub, `name` or `name/config`.

    Raises:
        DataError: The source is missing, damaged, empty or cannot be reached.

    Example:
        >>> list(read_splits("docstrings")["test"].columns)
        ['text', 'label', 'kind', 'module']
    """
    splits = _read_splits(source)
    names = {name: f'split "{name}" of {source}' if len(splits) > 1 else source for name in splits}
    return {name: replace(table, name=names[name]) for name, table in splits.items()}


def _read_splits(source: str) -> Mapping[str, Table]:
    path = Path(source).expanduser()
    if source == BUILT_IN:
        from .docstrings import load_docstrings

        return {name: Table.from_rows(rows) for name, rows in load_docstrings().items()}
    if os.path.isfile(path):  # noqa: PTH113 – pathlib raises for a long name
        return {"train": read_table(path)}
    if os.path.isdir(path):  # noqa: PTH112
        return _read_folder(path)
    here = os.path.isdir(path.parent)  # noqa: PTH112
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")] if here else []
    # with a suffix, what is nearly the name of a file is one; asking the hub for it would take its retries
    mistyped = bool(path.suffix and get_close_matches(path.name, names, cutoff=0.75))
    is_path = source.startswith((".", "/", "~")) or path.suffix.lower() in READERS or mistyped
    if not here and is_path:
        raise DataError(f"There is no file {path}: its folder {path.parent} does not exist either.")
    if here and (is_path or "/" in source or os.sep in source):
        raise DataError(f"There is no file {path}. {near(path.name, names)} (in {path.parent.resolve()})")
    return _read_hub(source)


def _read_folder(path: Path) -> dict[str, Table]:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            return _by_split(load_from_disk(str(path)))
        except Exception as error:  # damage shows as whatever Arrow, JSON or the file system say
            raise DataError(f"The folder {path} is damaged and cannot be loaded: {error}") from error
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    splits: dict[str, Path] = {}
    for file in files:
        name = re.split(r"[-_.]", file.stem.lower())[0]
        name = "train" if name == "training" else name
        if name in SPLITS:
            if name in splits:
                raise DataError(
                    f"The folder {path} has two files for its split {name}, {splits[name].name} and {file.name}. "
                    "Name one of its files."
                )
            splits[name] = file
    if not splits:
        hint = (
            f"Name one of its files: {', '.join(file.name for file in files)}." if files else "Name a file."
        )
        raise DataError(
            f"The folder {path} was not written by save_to_disk, and no file is called train, dev or test. {hint}"
        )
    return {name: read_table(file) for name, file in splits.items()}


def _read_hub(source: str) -> dict[str, Table]:
    from datasets import load_dataset

    owner, _, last = source.rpartition("/")
    refusals = []
    # "a/b" may be owner and name or name and config
    for reading in [(source,), (owner, last)] if owner else [(source,)]:
        try:
            return _by_split(load_dataset(*reading))
        except Exception as error:  # the hub's client raises the errors of four libraries
            refusals.append(f"{' '.join(reading)}: {str(error).strip() or type(error).__name__}")
    raise DataError(
        f'"{source}" is no file or folder here, and the Hugging Face hub did not give it '
        f"({'; '.join(refusals)}). Check the name and the network, or name a file "
        f"({', '.join(READERS)}) or the built-in set {BUILT_IN}."
    )


def _by_split(loaded: Any) -> dict[str, Table]:
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {name: Table.from_arrow(rows.with_format("arrow")[:]) for name, rows in splits.items()}
