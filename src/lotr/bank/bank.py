"""`CoreBank`: a basis and any number of named tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnknownTaskError
from ..files.adapter_folder import read_adapter
from ..tuner.config import LotrConfig
from . import recover, transfer
from .basis import TASKS, Basis, create_folder
from .head_form import head_form
from .store import TaskStore
from .task import DTYPES, Task, check_name, to_record, to_task
from .wrap import BankModel, wrap


class CoreBank:
    """One basis, and tasks that differ in their cores (and heads) alone: `ΔW_{t,s} = σ · U · C_{t,s} · Vᵀ`.

    Make one with `CoreBank.create`, open one with `CoreBank.open`. Opening reads no task. A name that the bank has no
    task of is an `UnknownTaskError`, and a damaged task a `CheckpointError` of its own: the others stay readable.

    Attributes:
        layout: Which numbers a task has, in which order.
        base_model: Name or path of the base model, where the basis told one.
        dtype: Type in which tasks are kept.
        task_bytes: Bytes of the numbers of one task; of the largest, where tasks have factors by cluster.

    Example:
        >>> import tempfile, lotr, torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(hidden_size=48, num_hidden_layers=2, intermediate_size=64))
        >>> folder = tempfile.mkdtemp()
        >>> get_peft_model(base, lotr.LotrConfig(r=4)).save_pretrained(f"{folder}/basis")
        >>> bank = CoreBank.create(f"{folder}/bank", basis=f"{folder}/basis", dtype="float32")
        >>> bank.add(Task("reviews", torch.randn(bank.layout.size)))
        0.0
        >>> len(bank), "reviews" in bank, bank.get("reviews").numbers.shape
        (1, True, torch.Size([64]))
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path, self.basis = path, Basis(path)
        self.plan, self.layout = self.basis.plan, self.basis.layout
        self.description = known = self.basis.description
        self.base_model, self.dtype, self.task_bytes = known.base_model, known.dtype, self.basis.task_bytes
        self.store = TaskStore(path / TASKS, writable)
        self.store.check_basis(known.basis_hash)

    @classmethod
    def create(cls, path: str | Path, basis: str | Path, *, dtype: str = "bfloat16") -> CoreBank:
        """Make an empty bank and open it for writing; the folder is there whole or not at all.

        Args:
            path: Folder to make.
            basis: Folder or hub id of a LoTR adapter with cores, without a magnitude; its factors are copied.
            dtype: Type in which tasks are kept: float32, bfloat16 or float16.

        Raises:
            ConfigError: The folder is not free, the type is not known, or the adapter cannot be a basis.
            CheckpointError: The adapter is damaged.
        """
        create_folder(Path(path), basis, dtype)
        return cls(Path(path), writable=True)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> CoreBank:
        """Open a bank; the time does not depend on how many tasks it has.

        Raises:
            CheckpointError: There is no bank, it is damaged, or another version of the library made it.
        """
        return cls(Path(path), writable)

    def __reduce__(self) -> tuple[Any, ...]:
        return CoreBank, (self.path, self.store.database.writable)

    def __repr__(self) -> str:
        return (
            f"CoreBank({str(self.path)!r}: {len(self):,} tasks of {self.layout.kept:,} numbers, {self.task_bytes:,} "
            f"bytes each in {self.dtype}, for {self.base_model!r})"
        )

    def close(self) -> None:
        """Let go of the files."""
        self.store.database.close()

    def __enter__(self) -> CoreBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> LotrConfig:
        """Configuration of a new task on this basis, for `get_peft_model`: its factors are the bank's."""
        return self.basis.config

    def wrap(self, base: nn.Module, capacity: int | str = 1024) -> BankModel:
        """Put the bank on its base model: every row of a batch uses a task of its own.

        Row `i` uses task `task_ids[i]`: `model(**batch, task_ids=["a", None, "b"])`; `None` (or `"__base__"`) is the
        base model. PEFT's `adapter_names=` does the same, `model.generate` takes both, and
        `with model.select(["a", None, "b"]):` serves code that can pass neither. A choice belongs to its call: threads
        that use one model at once never see each other's. Tasks are read when they are first used. A batch may have
        several sequences a row in a run, as beam search does.

        Where the model has a head, each row goes through its task's own; `logits` are as wide as the most labels in
        the batch, the lowest finite number where a row's task has no such label, and `loss` is the mean over rows.

        Args:
            base: The model that the basis was trained on, changed in place.
            capacity: Tasks in memory: a number, or bytes (`"256MB"`).

        Returns:
            A PEFT model. It is the base model where nothing is selected.

        Raises:
            ConfigError: The model is not bare.
            CheckpointError: The base model is another one.
            PlanError: The base model has other modules.

        Example:
            >>> model = CoreBank.open("bank").wrap(base)  # doctest: +SKIP
            >>> model(**batch, task_ids=["mail", "news", None]).logits.shape  # doctest: +SKIP
            torch.Size([3, 4])
        """
        return wrap(self.basis, base, capacity)

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, name: object) -> bool:
        return name in self.store

    def names(self) -> Iterator[str]:
        """Yield the names of all tasks in the order of their characters, without reading a task."""
        return iter(self.store.names())

    def get(self, name: str) -> Task:
        """Return a task, its numbers in float32."""
        return to_task(self.store.read(name), self.layout)

    def read(self, names: Sequence[str]) -> tuple[Tensor, list[Task]]:  # (n, size)
        """Return the numbers of tasks in float32, shape `(n, size)`, and the tasks, in the order of the names."""
        tasks = [self.get(name) for name in ([names] if isinstance(names, str) else names)]
        numbers = [task.numbers for task in tasks]
        return torch.stack(numbers) if numbers else torch.empty(0, self.layout.size), tasks

    def add(self, task: Task, *, replace: bool = False) -> float:
        """Add a task; once this returns, it is on the disk.

        Args:
            task: The task.
            replace: Put it in the place of the task of its name, where there is one.

        Returns:
            What rounding to the bank's type cost: `‖kept − x‖ / ‖x‖` over the cores.

        Raises:
            ConfigError: The name is taken, or the numbers do not fit the bank or its type.
            CheckpointError: The disk is full or the bank is damaged; nothing was written.
        """
        return self.add_many([task], replace=replace)

    def add_many(self, tasks: Iterable[Task], *, replace: bool = False) -> float:
        """Add all of the tasks or, when one of them cannot be, none; returns the largest error of rounding."""
        worst, other = 0.0, None
        with self.store.database.transaction():
            for task in tasks:
                record = to_record(task, self.layout, self.dtype)
                if task.head:
                    other = self._check_head(task, other)
                self.store.write(record, replace)
                worst = max(worst, record.error)
        return worst

    def _check_head(self, task: Task, other: Task | None) -> Task:
        """Refuse a head unlike those of other tasks; returns the task, for the next one."""
        if other is None and (record := self.store.with_head(task.name)) is not None:
            other = to_task(record, self.layout)
        if other is not None and head_form(task.head) != head_form(other.head):
            raise ConfigError(
                f"The head of task {task.name!r} is {head_form(task.head)}, and that of task {other.name!r} is "
                f"{head_form(other.head)}. Tasks of a bank have one base model: train it on that, or remove the other."
            )
        return task

    def add_adapter(self, name: str, adapter: str | Path, *, replace: bool = False, **metadata: Any) -> float:
        """Add an adapter that was saved on this basis (or is the basis itself); see `add` and `from_adapter`."""
        return self.add(self.from_adapter(name, adapter, **metadata), replace=replace)

    def from_adapter(self, name: str, adapter: str | Path, **metadata: Any) -> Task:
        """Return a saved adapter as a task of this bank, without adding it.

        Args:
            name: What the task shall be called.
            adapter: Folder or hub id of a LoTR adapter whose factors are the bank's, in its file or by reference.
            metadata: Added to what the adapter's `task.json` tells.

        Raises:
            CheckpointError: The adapter has other factors, another structure, or another base model.
        """
        return transfer.task_of(self.basis, name, read_adapter(adapter), metadata)

    def export(
        self,
        name: str,
        output: str | Path,
        *,
        as_lora: bool = False,
        refer: bool = False,
        overwrite: bool = False,
        pad_rank: int | None = None,
    ) -> dict[str, Any]:
        """Write a task as an adapter that stands alone, or refers to this bank, or as LoRA.

        Args:
            name: The task.
            output: Folder to make; the name of the task is no part of it.
            as_lora: Write plain PEFT LoRA, which needs nothing of this library.
            refer: Leave the factors out; the file refers to the bank as its basis.
            overwrite: Replace the folder when it is not empty.
            pad_rank: Of a LoRA, the rank to bring all modules to, with zeros.

        Returns:
            What was written: numbers and bytes.

        Raises:
            ConfigError: The folder is not free, a LoRA was asked to refer to a basis, or an adapter to be padded.
            CheckpointError: The basis is damaged.
        """
        return transfer.export(self.basis, self.get(name), Path(output), as_lora, refer, overwrite, pad_rank)

    def remove(self, *names: str) -> None:
        """Remove tasks, damaged or not: all of those named, or none."""
        with self.store.database.transaction():
            for name in dict.fromkeys(names):
                self.store.remove(name)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; ConfigError where there is a task `new`, or it cannot be a name."""
        with self.store.database.transaction():
            self.store.rename(old, check_name(new))

    def about(self, name: str) -> dict[str, Any]:
        """Return what is known of a task, as plain values."""
        record = self.store.read(name)
        task = to_task(record, self.layout)
        return {
            "name": task.name,
            "task": task.task,
            "labels": list(task.labels),
            "created": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds"),
            "dtype": record.dtype,
            "numbers": len(record.numbers) // DTYPES[record.dtype].itemsize,
            "cluster": self.layout.cut(task.numbers)[0],
            "bytes": len(record.numbers),
            "rounding_error": record.error,
            "norm": float(task.numbers.norm()),
            "head": {key: list(tensor.shape) for key, tensor in task.head.items()},
            "head_bytes": len(record.head),
            "checksum": record.checksum.hex(),
            "metadata": dict(task.metadata),
        }

    def overview(self, after: str = "", limit: int = -1) -> list[dict[str, Any]]:
        """Return name, kind, number of classes and time of tasks behind a name, in the order of their names."""
        rows: list[dict[str, Any]] = []
        for name in self.store.names(after, limit):
            try:
                task = self.about(name)
            except UnknownTaskError:  # somebody has removed it since
                continue
            except CheckpointError:
                task = {"task": "damaged", "labels": (), "created": ""}
            kind, classes = task["task"] or "", len(task["labels"]) or ""
            rows.append({"name": name, "kind": kind, "classes": classes, "created": task["created"]})
        return rows

    def stats(self) -> dict[str, Any]:
        """Return counts and bytes, as plain values; reads every record once for the errors of rounding."""
        tasks, kinds, numbers, worst = self.store.summary()
        files = [self.path / f"{TASKS}{end}" for end in ("", "-wal")]
        file_bytes = sum(file.stat().st_size for file in files if file.exists())
        return {
            "tasks": tasks,
            "kinds": kinds,
            "base_model": self.base_model,
            "dtype": self.dtype,
            "numbers_per_task": self.layout.kept,
            "clusters": len(self.layout.supports) or 1,
            "bytes_per_task": self.task_bytes,
            "bytes_of_numbers": numbers,
            "bytes_of_tasks": file_bytes,
            "over_the_numbers": round(file_bytes / numbers, 4) if numbers else None,
            "basis_numbers": self.plan.n_factors,
            "worst_rounding_error": worst,
        }

    def verify(self, tick: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Read everything: the description, the basis, every page of the file of tasks, and every task.

        What one file lacks keeps no other from being judged.

        Args:
            tick: Called as tasks are done.

        Returns:
            `ok`; `tasks`, how many there are; `damaged`, each with its name and the reason; `files`, what is wrong with
            the files, a line each.
        """
        return recover.verify(self.path, tick)
