"""`CoreBank`: a basis and any number of named tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.adapter_folder import read_adapter
from ..sharing.plan import Plan
from ..tuner.config import LotrConfig
from ..tuner.saved_adapter import read_basis, read_saved
from . import folder, report
from . import transfer as adapters
from .codec import n_bytes
from .layout import Layout
from .record import to_row, to_tasks
from .store import TaskStore
from .task import Task, check_name

if TYPE_CHECKING:
    from peft import PeftModel


class CoreBank:
    """One basis, and tasks that differ in their cores (and heads) alone: `ΔW_{t,s} = σ · U · C_{t,s} · Vᵀ`.

    Make one with `CoreBank.create`, open one with `CoreBank.open`. Opening reads no task.

    Example:
        >>> import tempfile, lotr, torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(hidden_size=48, num_hidden_layers=2, intermediate_size=64))
        >>> place = tempfile.mkdtemp()
        >>> get_peft_model(base, lotr.LotrConfig(r=4)).save_pretrained(f"{place}/basis")
        >>> bank = CoreBank.create(f"{place}/bank", basis=f"{place}/basis", dtype="float32")
        >>> bank.add(Task("reviews", torch.randn(bank.layout.size)))
        0.0
        >>> len(bank), "reviews" in bank, bank.get("reviews").numbers.shape
        (1, True, torch.Size([64]))
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path = path
        self.description = folder.Description.read(path)
        saved = read_saved(path)
        self.plan: Plan = saved.plan
        self.layout = Layout.of(self.plan)
        self._config = saved.config
        self.store = TaskStore(path / folder.TASKS, writable)
        self._check_folder()

    def _check_folder(self) -> None:
        said = self.description
        if said.layout != self.layout.to_list():
            raise CheckpointError(
                f"{self.path}: bank.json tells of {said.numbers} numbers a task, and adapter_config.json beside it of "
                f"{self.layout.size}, or of the same in another order. They were put together from different banks."
            )
        if said.basis_hash != self.store.basis_hash:
            raise CheckpointError(
                f"The tasks in {self.path / folder.TASKS} belong to a basis with hash {self.store.basis_hash}, and "
                f"bank.json tells of {said.basis_hash}. The files were put together from different banks."
            )

    @classmethod
    def create(cls, path: str | Path, basis: str | Path, *, dtype: str = "bfloat16") -> CoreBank:
        """Make an empty bank and open it for writing.

        Args:
            path: Folder to make.
            basis: Folder or hub id of a LoTR adapter with cores, without a magnitude; its factors are copied.
            dtype: Type in which tasks are kept: float32, bfloat16, float16, or int8 with one scale a core.

        Raises:
            ConfigError: The folder is not free, the type is not known, or the adapter cannot be a basis.
            CheckpointError: The adapter is damaged.
        """
        folder.create(Path(path), basis, dtype)
        return cls(Path(path), writable=True)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> CoreBank:
        """Open a bank; the time does not depend on how many tasks it has.

        Raises:
            CheckpointError: There is no bank, it is damaged, or a newer version of the library made it.
        """
        return cls(Path(path), writable)

    def __reduce__(self) -> tuple[Any, ...]:
        return CoreBank, (self.path, self.store.writable)

    def close(self) -> None:
        """Let go of the files."""
        self.store.close()

    def __enter__(self) -> CoreBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the basis

    @property
    def base_model(self) -> str | None:
        """Name or path of the base model, where the basis told one."""
        return self.description.base_model

    @property
    def dtype(self) -> str:
        """Type in which tasks are kept."""
        return self.description.dtype

    @property
    def config(self) -> LotrConfig:
        """Configuration of a new task on this basis, for `get_peft_model`: its factors are the bank's."""
        config = copy.copy(self._config)
        config.basis, config.basis_hash = str(self.path.resolve()), self.description.basis_hash
        config.trainable, config.inference_mode = "cores", False
        return config

    def basis_tensors(self) -> dict[str, Tensor]:
        """Return `U` and `V` (transposed) of every group, by their key in an adapter's file.

        Raises:
            CheckpointError: They are damaged, or of another bank.
        """
        return read_basis(self.config)

    def check_base(self, model: nn.Module) -> None:
        """Refuse a base model on which the tasks were not trained.

        Args:
            model: The bare base model.

        Raises:
            CheckpointError: Its adapted weights are others than those that the basis was made for.
        """
        self.description.check_base(model, [target.path for target in self.plan.targets], self.path)

    def wrap(self, base: nn.Module, capacity: int | str = 1024) -> PeftModel:
        """Put the bank on its base model: every row of a batch uses a task of its own; see `lotr.bank.wrap.wrap`."""
        from .wrap import wrap

        return wrap(self, base, capacity)

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, name: object) -> bool:
        return name in self.store

    def names(self) -> Iterator[str]:
        """Yield the names of all tasks in the order of their characters, without reading a task."""
        page = self.store.names(limit=1000)
        while page:
            yield from page
            page = self.store.names(after=page[-1], limit=1000)

    def get(self, name: str) -> Task:
        """Return a task, its numbers in float32.

        Raises:
            UnknownTaskError: There is none of this name.
            CheckpointError: It is damaged; the others stay readable.
        """
        return self.read([name])[1][0]

    def read(self, names: Sequence[str]) -> tuple[Tensor, list[Task]]:  # (n, size)
        """Return many tasks.

        Args:
            names: Their names, in any order.

        Returns:
            Their numbers in float32, shape `(n, size)`, and the tasks, whose numbers are rows of it.

        Raises:
            UnknownTaskError: There is none of one of the names.
            CheckpointError: One of them is damaged; the others stay readable.
        """
        return to_tasks([self.store.read(name) for name in names], self.layout)

    def about(self, name: str) -> dict[str, Any]:
        """Return what is known of a task, as plain values. See `report.about`."""
        return report.about(self, name)

    def stats(self) -> dict[str, Any]:
        """Return counts and bytes of the bank, as plain values. See `report.stats`."""
        return report.stats(self)

    def verify(self, tick: report.Tick | None = None) -> dict[str, Any]:
        """Read everything and report all that is damaged. See `report.verify`."""
        return report.verify(self, tick)

    def export(
        self,
        name: str,
        output: str | Path,
        *,
        as_lora: bool = False,
        refer: bool = False,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Write a task as a LoTR adapter that stands alone, as one that refers to this bank, or as plain LoRA.

        See `adapters.export`.
        """
        return adapters.export(self, name, Path(output), as_lora, refer, overwrite)

    # ------------------------------------------------------------------ writing

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
        """Add all of the tasks or, when one of them cannot be, none; see `add`.

        Returns:
            The largest error of rounding; zero without tasks.
        """
        worst = 0.0
        with self.store.transaction():
            for task in tasks:
                row = to_row(task, self.layout, self.dtype)
                self.store.write(row, replace)
                worst = max(worst, row.error)
        return worst

    def add_adapter(self, name: str, adapter: str | Path, *, replace: bool = False, **metadata: Any) -> float:
        """Add an adapter that was saved on this basis (or is the basis itself); see `add` and `from_adapter`."""
        return self.add(self.from_adapter(name, adapter, **metadata), replace=replace)

    def from_adapter(self, name: str, adapter: str | Path, **metadata: Any) -> Task:
        """Return a saved adapter as a task of this bank, without adding it. See `adapters.task_of`."""
        return adapters.task_of(self, name, read_adapter(adapter), metadata)

    def remove(self, *names: str) -> None:
        """Remove tasks, damaged or not: all of those named, or none.

        Raises:
            UnknownTaskError: There is none of one of the names.
        """
        with self.store.transaction():
            places = [self.store.place(name) for name in names]  # before any is gone, for what an error says
            for place in places:
                self.store.remove_at(place)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name.

        Raises:
            UnknownTaskError: There is no task `old`.
            ConfigError: There is a task `new`, or it cannot be a name.
            CheckpointError: The task is damaged.
        """
        with self.store.transaction():
            self.store.rename(old, check_name(new))

    @property
    def task_bytes(self) -> int:
        """Bytes of the numbers of one task."""
        return n_bytes(self.layout, self.dtype)
