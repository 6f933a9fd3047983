"""A bank on its base model, with the tokenizer that its rows need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from torch import Tensor

from ...bank import CoreBank, Task
from ...bank.task import kind_and_labels
from ...errors import ConfigError, UnknownTaskError
from ..base_model import load_model, load_tokenizer, longest_text
from ..data import Columns, TaskRecord, collator
from ..process import device

if TYPE_CHECKING:
    from ...bank.cache import LoadedTask
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

    def task(self, name: str) -> LoadedTask:
        """Return a task as the bank has it now; raises as `CoreBank.get` does, also for the name of the base model."""
        (task,) = self.rows.find([name])
        if task is None:
            raise UnknownTaskError(f"{name!r} is the base model without a task. Name a task of the bank.")
        self._check_kind(name, task.kind)
        return task

    def _check_kind(self, name: str, kind: str | None) -> None:
        if kind is not None and (kind == "causal-lm") != (self.kind == "causal-lm"):
            raise ConfigError(
                f"Task {name!r} is {kind}, and the base model is loaded for {self.kind}. Ask tasks of the two kinds "
                "apart, or keep them in banks of their own."
            )

    def record(self, name: str) -> TaskRecord:
        """Return what a task was trained for; raises as `CoreBank.get` does."""
        task = self.bank.get(name)
        about = task.metadata
        kind, labels = kind_and_labels(vars(task), task.head, "SEQ_CLS" if task.head else None)
        self._check_kind(name, kind)
        kind = kind or self.kind
        if kind == "classification" and not labels:
            raise ConfigError(f"Task {name!r} has no head, so it labels nothing. Add an adapter with one.")
        columns, length = Columns(**about.get("columns", {})), self.max_length(about)
        base, pairs = str(self.bank.base_model), about.get("pairs", False)
        return TaskRecord(kind, labels, length, columns, base, pairs)  # type: ignore[arg-type]

    def max_length(self, metadata: Mapping[str, Any]) -> int:
        """Return how long the texts of a task are in tokens: as it was trained, or as long as the model takes them."""
        own = metadata.get("max_length")
        return min(own, self._longest) if type(own) is int and own > 0 else self._longest

    @cached_property
    def _longest(self) -> int:
        return longest_text(self.model)

    def collator(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Return what makes a batch of rows of any tasks."""
        return collator(self.tokenizer, self.kind)

    # ------------------------------------------------------------------ while tasks train

    def begin(self, tasks: Sequence[Task], seed: int) -> None:
        """Put new tasks into memory: the numbers that the adapter on the model has, and heads drawn by the seed."""
        from peft import get_peft_model_state_dict

        name = self.model.active_adapter
        own = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
        numbers, head = self.bank.layout.flatten(own).float(), self.rows.head
        for task in tasks:
            drawn = crc32(f"{seed} {task.name}".encode())
            new = {} if head is None else head.fresh(len(task.labels) or 1, drawn)
            loaded = self.rows.load(replace(task, numbers=numbers.clone(), head=new))
            for parameter in loaded.parameters:
                parameter.requires_grad_()
            self.rows.cache.training[task.name] = loaded

    def tensors(self) -> dict[str, Tensor]:
        """Return what trains, by number of the task and name: the numbers of its cores, and those of its head."""
        tensors: dict[str, Tensor] = {}
        for n, task in enumerate(self.rows.cache.training.values()):
            head = {} if task.head is None else task.head.parameters
            tensors |= {f"{n}.numbers": task.numbers, **{f"{n}.head.{key}": p for key, p in head.items()}}
        return tensors

    def in_memory(self, task: Task) -> Task:
        """Return a task as it is in memory now."""
        loaded = self.rows.cache.training[task.name]
        head = {}
        if self.rows.head is not None and loaded.head is not None:
            prefix = self.rows.head.prefix
            head = {prefix + key: p.detach().cpu() for key, p in loaded.head.parameters.items()}
        return replace(task, numbers=loaded.numbers.detach().cpu(), head=head)


class OneTask:
    """The model of a bank as that of an adapter: all rows have one task, and as many logits as it has classes."""

    def __init__(self, served: Served, name: str, record: TaskRecord) -> None:
        self.model, self.name, self.device = served.model, name, served.model.device
        self.classes = None if served.kind == "causal-lm" else len(record.labels) or 1

    def __call__(self, **inputs: Any) -> Any:
        """Return the output of the model, with the logits of the task."""
        output = self.model(**inputs, task_ids=[self.name] * len(inputs["input_ids"]))
        output.logits = output.logits[..., : self.classes]
        return output


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
        kind: classification (or regression), or causal-lm; default: what the bank's first tasks are, damaged ones left
            out, or what its basis is for.
        capacity: Tasks in memory, a number or bytes.
        dtype: Type of the base model.
    """
    bank = bank if isinstance(bank, CoreBank) else CoreBank.open(bank)
    name = base_of(bank, model)
    if kind is None:
        kinds = (row["kind"] for row in bank.overview(limit=100))
        of_basis = "causal-lm" if bank.config.task_type == "CAUSAL_LM" else None
        kind = next((kind for kind in kinds if kind not in ("", "damaged")), of_basis)
    kind = "causal-lm" if kind == "causal-lm" else "classification"
    tokenizer = load_tokenizer(name)
    labels = ("0", "1") if kind == "classification" else ()
    base: Any = load_model(name, kind, labels, dtype, tokenizer)
    if kind == "classification" and not bank.plan.targets[0].path.startswith(f"{base.base_model_prefix}."):
        base = base.base_model  # the basis was made on the bare encoder: its tasks embed, and label nothing
    return Served(bank, bank.wrap(base.to(device()), capacity), tokenizer, kind)


def base_of(bank: CoreBank, model: str | None = None) -> str:
    """Return the name of a bank's base model, unless another is given."""
    name = model or bank.base_model
    if name is None:
        raise ConfigError(f"The bank in {bank.path} does not tell its base model. Name it with --model.")
    return name
