"""A bank on its base model, with the tokenizer that its rows need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...bank import CoreBank
from ...errors import ConfigError
from ..base_model import load_model, load_tokenizer
from ..data import collator
from ..trained import device

if TYPE_CHECKING:
    from peft import PeftModel

    from ...bank.wrap import TaskRows


@dataclass
class Served:
    """A bank, and a model on which its tasks answer."""

    bank: CoreBank
    model: PeftModel
    tokenizer: Any
    kind: str

    @property
    def rows(self) -> TaskRows:
        """Which task each row has."""
        rows: TaskRows = self.model.base_model.tasks  # type: ignore[assignment]
        return rows

    def fresh_numbers(self) -> Tensor:  # (size,)
        """Return the numbers with which a task begins: those that the adapter on the model has."""
        from peft import get_peft_model_state_dict

        own = get_peft_model_state_dict(
            self.model, adapter_name=self.model.active_adapter, save_embedding_layers=False
        )
        return self.bank.layout.flatten(own).float().cpu()

    def collator(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Return what makes a batch of rows of any tasks; class ids are real numbers beside those of a regression."""
        return collator(self.tokenizer, "causal-lm" if self.kind == "causal-lm" else "regression")

    def rest(self) -> None:
        """Answer with the tasks as the bank holds them."""
        self.model.eval()
        slab = self.rows.slab
        slab.source, slab.came, slab.leaves = self.bank, None, None
        slab.numbers.requires_grad_(False)
        for table in slab.heads.tables.values() if slab.heads is not None else ():
            table.requires_grad_(False)
        slab.forget()


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

    Raises:
        CheckpointError: The bank or the base model is not the right one.
        ConfigError: The base model cannot be loaded.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bank = bank if isinstance(bank, CoreBank) else CoreBank.open(bank)
    name = base_of(bank, model)
    if kind is None:
        first = next(islice(bank.names(), 1), None)
        kind = str(bank.get(first).task) if first is not None else "classification"
    kind = "causal-lm" if kind == "causal-lm" else "classification"
    tokenizer = load_tokenizer(name)
    labels = ("0", "1") if kind == "classification" else ()
    base: nn.Module = load_model(name, kind, labels, dtype, tokenizer)
    limit = int(capacity) if isinstance(capacity, str) and capacity.isdigit() else capacity
    return Served(bank, bank.wrap(base.to(device()), limit), tokenizer, kind)


def base_of(bank: CoreBank, model: str | None = None) -> str:
    """Return the name of a bank's base model.

    Raises:
        ConfigError: It is not recorded, and no other is given.
    """
    name = model or bank.base_model
    if name is None:
        raise ConfigError(f"The bank in {bank.path} does not tell its base model. Name it with --model.")
    return name
