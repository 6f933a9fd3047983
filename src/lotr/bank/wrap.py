"""A base model with a bank on it: every row of a batch uses a task of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tuner.batch_cores import Rows
from ..tuner.group import LotrGroup
from .cache import Slab, tasks_in
from .heads import NAMES, HeadRows, Heads, RowHead, row_losses
from .layout import Layout

if TYPE_CHECKING:
    from peft import PeftModel

    from .bank import CoreBank

ADAPTER = "bank"


class TaskRows:
    """Which task each row of a batch has, and the numbers that make it so.

    Args:
        groups: What the sites of the basis share.
        layout: The order of a task's numbers.
        slab: The tasks in memory.
        head: The head of the model, where it has one.
    """

    def __init__(
        self, groups: Sequence[LotrGroup], layout: Layout, slab: Slab, head: RowHead | None = None
    ) -> None:
        self.groups, self.layout, self.slab, self.head = tuple(groups), layout, slab, head
        self._forwards: list[Any] = []  # selections that a forward pass opened

    @contextmanager
    def select(self, names: Sequence[str | None]) -> Iterator[None]:
        """Use a task in each row of the batches that run inside; see `wrap`.

        Raises:
            ConfigError: More tasks than the capacity.
            CheckpointError: A task does not exist or is damaged.
        """
        if isinstance(names, str | Tensor):
            raise ConfigError(
                f"Tasks are named by {type(names).__name__}. Give a list with one name a row, None for the base model."
            )
        if not names:
            raise ConfigError("No rows are named. Name one task a row, None for the base model.")
        group = self.groups[0]
        if group.merged_adapters or ADAPTER not in group.active_adapters:
            raise ConfigError(
                f"Rows cannot have tasks while adapters are merged, or while {ADAPTER!r} is not the active one. "
                f"Call unmerge_adapter(), or set_adapter({ADAPTER!r})."
            )
        before = self._rows, self._head_rows
        self._set(*self._gather(names))
        try:
            yield
        finally:
            self._set(*before)

    @property
    def _rows(self) -> Rows | None:
        return self.groups[0].rows.get(ADAPTER)

    @property
    def _head_rows(self) -> HeadRows | None:
        return None if self.head is None else self.head.rows

    def _gather(self, names: Sequence[str | None]) -> tuple[Rows | None, HeadRows | None]:
        home = self.groups[0].lotr_V[ADAPTER].weight.device
        self.slab.to(home)
        places = self.slab.slots_of(names)
        if not any(places):
            return None, None  # the base model itself, bit for bit
        slots = torch.tensor(places, device=home)
        rows = Rows(self.layout.unflatten(self.slab.gather(slots)))
        return rows, None if self.slab.heads is None else self.slab.heads.rows(slots, places)

    def _set(self, rows: Rows | None, head: HeadRows | None) -> None:
        for group in self.groups:
            if rows is None:
                group.rows.pop(ADAPTER, None)
            else:
                group.rows[ADAPTER] = rows
        if self.head is not None:
            self.head.rows = head

    # ------------------------------------------------------------------ what the hooks of the model call

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Select the tasks that a call names, and keep the labels from a loss that knows one head only."""
        given = [kwargs.pop(key, None) for key in ("task_ids", "adapter_names")]
        names: Any = next((names for names in given if names is not None), None)
        if names is not None:
            batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if batch is not None and not isinstance(names, str | Tensor) and len(names) != len(batch):
                raise ConfigError(
                    f"{len(names)} tasks are named for a batch of {len(batch)} rows. Name one task a row, None for the "
                    "base model."
                )
            if torch.is_grad_enabled() and _checkpoints(model):
                raise ConfigError(
                    "With gradient checkpointing the layers run again in the backward pass, when the tasks of the call "
                    "are gone. Put forward and backward into `with model.select(task_ids):`."
                )
            selection = self.select(names)
            selection.__enter__()
            self._forwards.append(selection)
        else:
            self._forwards.append(None)
        labels = None if self._head_rows is None else kwargs.pop("labels", None)
        self._forwards.append(labels)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the loss, and end the selection of the call; also runs when the call failed."""
        if not self._forwards:  # the selection itself was refused
            return output
        labels, selection = self._forwards.pop(), self._forwards.pop()
        try:
            if labels is not None and output is not None:
                loss = self.losses(output["logits"], labels).mean()
                return type(output)(**{"loss": loss, **output})
            return output
        finally:
            if selection is not None:
                selection.__exit__(None, None, None)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:  # (rows,)
        """Return the loss of each row of the selected tasks."""
        head = self._head_rows
        return row_losses(logits, labels, None if head is None else head.regression)


def _checkpoints(model: nn.Module) -> bool:
    return model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def wrap(bank: CoreBank, base: nn.Module, capacity: int | str = 1024) -> PeftModel:
    """Put a bank on its base model.

    Row `i` of a batch uses task `task_ids[i]`: `model(**batch, task_ids=["a", None, "b"])`; `None` (or
    `"__base__"`) is the base model. PEFT's `adapter_names=` does the same, in `generate` too, and
    `with model.select(["a", None, "b"]):` serves code that can pass neither. Tasks are read when they are first
    used. A batch may have several sequences a row in a run, as beam search does.

    Where the model has a head, each row goes through its task's own; `logits` are as wide as the most labels in
    the batch, the lowest finite number where a row's task has no such label, and `loss` is the mean over rows.

    Args:
        bank: An open bank.
        base: The model that the basis was trained on, changed in place.
        capacity: Tasks in memory: a number, or bytes (`"256MB"`).

    Returns:
        A PEFT model. It is the base model where nothing is selected.

    Raises:
        ConfigError: The model is not bare.
        CheckpointError: The base model is another one.
        PlanError: The base model has other modules.

    Example:
        >>> model = wrap(CoreBank.open("bank"), base)  # doctest: +SKIP
        >>> model(**batch, task_ids=["mail", "news", None]).logits.shape  # doctest: +SKIP
        torch.Size([3, 4])
    """
    from peft import PeftModel

    if any(isinstance(module, LotrGroup | RowHead) for module in base.modules()):
        raise ConfigError(
            "The model has a bank or an adapter on it already. Give the bare base model, loaded anew."
        )
    bank.check_base(base)
    config = bank.config
    # everything is frozen, and loss and head are the bank's: a task type would make PEFT train a head of its own
    config.inference_mode, config.task_type, config.modules_to_save = True, None, None
    config.init, config.init_weights = "orthonormal", None
    model = PeftModel(base, config, adapter_name=ADAPTER)
    groups = [module for module in model.modules() if isinstance(module, LotrGroup)]
    factor = groups[0].lotr_V[ADAPTER].weight
    width = bank.layout.size * factor.element_size()
    path = next((name for name in NAMES if isinstance(getattr(base, name, None), nn.Module)), None)
    head = heads = None
    if path is not None:
        module = getattr(base, path)
        width += sum(4 * p.numel() for p in module.parameters())
        heads = Heads(path, module, tasks_in(capacity, width) + 1)
        head = RowHead(module)
        setattr(base, path, head)
    slab = Slab(bank, bank.layout.size, tasks_in(capacity, width), factor.dtype, factor.device, heads)
    rows = TaskRows(groups, bank.layout, slab, head)
    model.base_model.tasks = rows  # type: ignore[assignment]
    model.register_forward_pre_hook(rows.before, with_kwargs=True)
    model.register_forward_hook(rows.after, with_kwargs=True, always_call=True)
    return model.eval()
