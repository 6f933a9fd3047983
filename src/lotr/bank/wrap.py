"""A base model with a bank on it: every row of a batch uses a task of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError
from ..tuner.batch_cores import Rows, RowsOfCall
from ..tuner.experts import LotrExperts
from ..tuner.group import LotrGroup
from .basis import TASKS, Basis
from .cache import LoadedTask, TaskCache
from .heads import NAMES, RowHead, row_losses, side_by_side
from .layout import Layout
from .store import TaskStore
from .task import BASE, Record, Task, to_task

ADAPTER = "bank"


class TaskRows:
    """Finds what each row of a batch has of its own, and selects it for the call that runs.

    `group` is one of those that the sites of the basis share; `current` is where the modules of the model look, and
    `hooks` are those that the model has for it.
    """

    def __init__(
        self,
        group: LotrGroup,
        layout: Layout,
        cache: TaskCache,
        current: RowsOfCall,
        head: RowHead | None,
        hooks: Sequence[RemovableHandle],
    ) -> None:
        self.group, self.layout, self.cache, self.current, self.head = group, layout, cache, current, head
        self.hooks = hooks

    def select(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use a task in each row of the batches that this thread, or task of asyncio, runs inside."""
        return self.current.use(self.rows(names))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads files
    def rows(self, names: Sequence[str | None]) -> Rows | None:
        """Return what rows with these tasks have of their own; nothing where all are of the base model."""
        if isinstance(names, str | Tensor):
            raise ConfigError(
                f"Tasks are named by {type(names).__name__}. Give a list with one name a row, None for the base model."
            )
        if not names:
            raise ConfigError("No rows are named. Name one task a row, None for the base model.")
        return self.of(self.find(names))

    def find(self, names: Sequence[str | None]) -> list[LoadedTask | None]:
        """Return the tasks of rows as the bank has them now, for `use` at any later time."""

        def load(record: Record) -> LoadedTask:
            return self.load(to_task(record, self.layout))

        needed = list(dict.fromkeys(name for name in names if name is not None and name != BASE))
        tasks = self.cache.get(needed, load) if needed else {}
        device = self.group.lotr_V[ADAPTER].weight.device
        if any(task.numbers.device != device for task in tasks.values()):  # the model has moved
            self.cache.clear()
            return self.find(names)
        return [None if name is None else tasks.get(name) for name in names]

    def use(self, tasks: Sequence[LoadedTask | None]) -> AbstractContextManager[None]:
        """Use a task in each row as `select` does; `None` is the base model."""
        return self.current.use(self.of(tasks))

    def of(self, tasks: Sequence[LoadedTask | None]) -> Rows | None:
        """Return what rows with these tasks have of their own."""
        if self.group.merged_adapters or ADAPTER not in self.group.active_adapters:
            raise ConfigError(
                f"Rows cannot have tasks while adapters are merged, or while {ADAPTER!r} is not the active one. "
                f"Call unmerge_adapter(), or set_adapter({ADAPTER!r})."
            )
        some = next((task for task in tasks if task is not None), None)
        if some is None:
            return None  # the base model itself, bit for bit
        base = LoadedTask(some.numbers.new_zeros(self.layout.size))
        own = [task or base for task in tasks]
        heads = None if self.head is None else side_by_side([task.head or self.head.of_base for task in own])
        return Rows(
            self.layout.unflatten(
                torch.stack([self.layout.fill(task.cluster, task.numbers) for task in own])
            ),
            heads,
        )

    def load(self, task: Task) -> LoadedTask:
        """Return what a batch needs of a task, where the model is."""
        factor = self.group.lotr_V[ADAPTER].weight
        head = None if self.head is None else self.head.of(task, factor.device)
        cluster, numbers = self.layout.cut(task.numbers)
        return LoadedTask(numbers.to(factor), head, task.task, task.labels, task.metadata, cluster)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:  # (rows,)
        """Return the loss of each row of the selected tasks."""
        rows = self.current.get()
        return row_losses(logits, labels, None if rows is None else rows.head)

    def leave(self, model: nn.Module) -> None:
        """Take out of the base model what `wrap` put into it beside the adapter."""
        if self.head is not None:
            setattr(model, self.head.path, self.head.head)
        for hook in self.hooks:
            hook.remove()
        self.current.forget_in_checkpoints(model)


class BankModel(PeftModel):
    """A base model with a bank on it; see `CoreBank.wrap`."""

    @property
    def tasks(self) -> TaskRows:
        """The tasks in memory, and which of them a call uses."""
        return self.base_model.tasks  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model returns, row `i` of the batch with task `task_ids[i]`, or `adapter_names[i]`.

        Raises:
            ConfigError: There is not one name a row, or the model is a replica of `DataParallel`.
            DataError: A label is none of its row's task.
        """
        rows = self._rows(args, kwargs)
        if torch.is_grad_enabled() and self.training:
            self.tasks.current.remember_in_checkpoints(self.base_model)
        # a loss of the base model knows one head only
        labels = kwargs.pop("labels", None) if rows is not None and rows.head is not None else None
        with self.tasks.current.running(rows):
            output = super().forward(*args, **kwargs)
        if labels is None:
            return output
        loss = row_losses(output["logits"], labels, None if rows is None else rows.head).mean()
        return type(output)(**{"loss": loss, **output})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base model does, with tasks and errors as in `forward`."""
        with self.tasks.current.running(self._rows(args, kwargs)):
            return super().generate(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the tasks are in the bank, and the adapter on the model is none of them."""
        raise ConfigError(
            "The tasks of a bank are in its folder, and this model holds none of its own. Write one as an adapter with "
            "bank.export(name, folder)."
        )

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: rows have tasks of their own, and a merged weight has one update."""
        raise ConfigError(
            "A bank cannot be merged: every row may have another task. Write one as an adapter with bank.export(name, "
            "folder), and merge that; unload() takes the bank off the model."
        )

    def _rows(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Rows | None:
        """Return what the rows of a call have of their own: those named, which leave its arguments, or selected."""
        task_ids, names = kwargs.pop("task_ids", None), kwargs.pop("adapter_names", None)
        if getattr(self, "_is_replica", False):
            raise ConfigError(
                "DataParallel runs a model in threads that do not know the tasks of the call. Use one process a device."
            )
        if task_ids is not None and names is not None:
            raise ConfigError("task_ids= and adapter_names= both name the tasks of the rows. Leave out one.")
        names = names if task_ids is None else task_ids
        if names is None:
            return self.tasks.current.get()
        main = getattr(self.get_base_model(), "main_input_name", "input_ids")
        inputs = (*(kwargs.get(name) for name in (main, "inputs", "inputs_embeds")), *args)
        batch = next((value for value in inputs if isinstance(value, Tensor)), None)
        if batch is not None and not isinstance(names, str | Tensor) and len(names) != len(batch):
            raise ConfigError(
                f"{len(names)} tasks are named for a batch of {len(batch)} rows. Name one task a row, None for the "
                "base model."
            )
        return self.tasks.rows(names)


def wrap(basis: Basis, base: nn.Module, capacity: int | str) -> BankModel:
    """Put the bank of a basis on its base model; see `CoreBank.wrap`."""
    if any(isinstance(module, LotrGroup | RowHead) for module in base.modules()):
        raise ConfigError(
            "The model has a bank or an adapter on it already. Give the bare base model, loaded anew."
        )
    basis.check_base(base)
    config = basis.config
    # everything is frozen, and loss and head are the bank's: a task type would make PEFT train a head of its own
    config.inference_mode, config.task_type, config.modules_to_save = True, None, None
    config.init, config.init_weights = "orthonormal", None
    path = next((name for name in NAMES if isinstance(getattr(base, name, None), nn.Module)), None)
    current = RowsOfCall()
    head = None if path is None else RowHead(path, getattr(base, path), current)
    numbers = basis.layout.kept + (0 if head is None else sum(p.numel() for p in head.parameters()))
    cache = TaskCache(TaskStore(basis.path / TASKS), capacity, 4 * numbers)
    before = _input_hooks(base)
    model = BankModel(base, config, adapter_name=ADAPTER)
    if path is not None:
        setattr(base, path, head)
    groups = [module for module in model.modules() if isinstance(module, LotrGroup)]
    for group in groups:
        group.rows[ADAPTER] = current
    # experts see tokens, and the block around them rows
    experts = [path for path, module in model.named_modules() if isinstance(module, LotrExperts)]
    blocks = (model.get_submodule(path.rpartition(".")[0]) for path in experts)
    hooks = [block.register_forward_pre_hook(current.see_batch, with_kwargs=True) for block in blocks]
    hooks += [hook for hook in _input_hooks(base) if hook not in before]
    tasks = TaskRows(groups[0], basis.layout, cache, current, head, hooks)
    model.base_model.tasks = tasks  # type: ignore[assignment]
    return model.eval()


def _input_hooks(base: nn.Module) -> list[RemovableHandle]:
    """Return those that let gradients reach the inputs, which PEFT adds where layers are checkpointed."""
    return list(getattr(base, "_require_grads_hooks", ()))
