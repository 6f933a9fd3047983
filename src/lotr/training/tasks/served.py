"""A bank on its base model, with the tokenizer that its rows need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from torch import Tensor, nn

from ...bank import CoreBank, Task
from ...errors import ConfigError
from ..base_model import load_model, load_tokenizer
from ..data import collator
from ..process import device

if TYPE_CHECKING:
    from ...bank.wrap import BankModel, TaskRows


@dataclass
class Served:
    """A bank, and a model on which its tasks answer."""

    bank: CoreBank
    model: BankModel
    tokenizer: Any
    kind: str  # of the model: causal-lm, or classification, which answers regressions, too

    @property
    def rows(self) -> TaskRows:
        """Which task each row has."""
        return self.model.tasks

    def collator(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Return what makes a batch of rows of any tasks."""
        return collator(self.tokenizer, self.kind)

    # ------------------------------------------------------------------ while tasks train

    def begin(self, tasks: Sequence[Task], seed: int) -> None:
        """Put tasks into memory as they begin: the numbers that the adapter on the model has, and new heads.

        Args:
            tasks: New tasks, with their labels; all of them fit.
            seed: Seed of the heads.
        """
        from peft import get_peft_model_state_dict

        name = self.model.active_adapter
        own = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
        numbers, heads = self.bank.layout.flatten(own).float().cpu(), self.rows.slab.heads
        for task in tasks:
            outputs, drawn = len(task.labels) or 1, crc32(f"{seed} {task.name}".encode())
            head = {} if heads is None else heads.fresh(outputs, drawn)
            self.rows.slab.put([replace(task, numbers=numbers, head=head)], {})

    def tables(self) -> dict[str, Tensor]:  # (slots, numbers) each
        """Return what the tasks in memory have: numbers of cores, and of heads by their names in the head."""
        slab = self.rows.slab
        heads = {} if slab.heads is None else slab.heads.tables
        return {"numbers": slab.numbers, **{f"head.{name}": table for name, table in heads.items()}}

    def in_memory(self, task: Task) -> Task:
        """Return a task as it is in memory now."""
        slab = self.rows.slab
        slot = slab.slots[task.name]
        head = {} if slab.heads is None else slab.heads.get(slot)
        return replace(task, numbers=slab.numbers[slot].detach().cpu(), head=head)

    def rest(self) -> None:
        """Answer with the tasks as the bank has them."""
        self.model.eval()
        for table in self.tables().values():
            table.requires_grad_(False)
        self.rows.slab.forget()


def load_served(
    bank: CoreBank | str | Path,
    model: str | None = None,
    kind: str | None = None,
    capacity: int | str = 1024,
    dtype: str = "float32",
) -> Served:
    """Put a bank on its base model.

    Args:
        bank: A bank, or its folder.
        model: Base model to use instead of the recorded one.
        kind: classification (or regression), or causal-lm; default: what the bank's tasks are.
        capacity: Tasks in memory, a number or bytes.
        dtype: Type of the base model.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bank = bank if isinstance(bank, CoreBank) else CoreBank.open(bank)
    name = base_of(bank, model)
    if kind is None:
        kind = next((str(bank.get(first).task) for first in islice(bank.names(), 1)), None)
    kind = "causal-lm" if kind == "causal-lm" else "classification"
    tokenizer = load_tokenizer(name)
    labels = ("0", "1") if kind == "classification" else ()
    base: nn.Module = load_model(name, kind, labels, dtype, tokenizer)
    return Served(bank, bank.wrap(base.to(device()), capacity), tokenizer, kind)


def base_of(bank: CoreBank, model: str | None = None) -> str:
    """Return the name of a bank's base model, unless another is given."""
    name = model or bank.base_model
    if name is None:
        raise ConfigError(f"The bank in {bank.path} does not tell its base model. Name it with --model.")
    return name
