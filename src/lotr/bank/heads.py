"""Heads of tasks: every row of a batch goes through the head of its own task, and has logits of its own labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import CheckpointError
from ..tuner.batch_cores import HeadRows, RowsOfCall
from .cache import take

if TYPE_CHECKING:
    from .task import Task

#: Where transformers' models have the head of a task; PEFT trains and saves modules of these names in full.
NAMES = ("classifier", "score")
_ROOT = "base_model.model."


class Heads:
    """Heads of the tasks in memory, slot by slot; slot 0 has the head of the base model.

    Args:
        path: Path of the head in the base model.
        module: The head.
        slots: Number of slots.
    """

    def __init__(self, path: str, module: nn.Module, slots: int) -> None:
        self.prefix = f"{_ROOT}{path}."
        own = {name: p.detach().float() for name, p in module.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in own.items()}
        #: Flat tables, so that their gradients are sparse: name in the head → (slots, numbers).
        self.tables = {name: p.new_zeros(slots, p.numel()) for name, p in own.items()}
        self.n_labels, self.regression = [0] * slots, [False] * slots
        self._last = [*own][-1].rpartition(".")[0]  # the linear module whose outputs are the labels
        self._write(0, own, False)

    def check(self, task: Task) -> None:
        """Refuse a head that the base model does not have.

        Raises:
            CheckpointError: The message names what is extra or missing.
        """
        odd = {key.removeprefix(self.prefix) for key in task.head} ^ self.shapes.keys()
        if task.head and odd:
            raise CheckpointError(
                f"The head of task {task.name!r} is not that of this base model at {self.prefix[len(_ROOT) : -1]!r}: "
                f"{', '.join(sorted(odd))} differ. Use the kind of model that the task was trained on."
            )

    def put(self, slot: int, task: Task) -> None:
        """Write the head of a task into a slot; a task without one has the base model's."""
        if task.head:
            own = {key.removeprefix(self.prefix): value for key, value in task.head.items()}
            self._write(slot, own, task.task == "regression")
            return
        for table in self.tables.values():
            table[slot] = table[0]
        self.n_labels[slot], self.regression[slot] = self.n_labels[0], False

    def get(self, slot: int) -> dict[str, Tensor]:
        """Return the head in a slot by its names in an adapter's file, without padding."""
        head = {}
        for name, table in self.tables.items():
            padded = table[slot].detach().reshape(self.shapes[name])
            rows = self.n_labels[slot] if self._is_last(name) else len(padded)
            head[self.prefix + name] = padded[:rows].clone()
        return head

    def fresh(self, n_labels: int, seed: int) -> dict[str, Tensor]:
        """Return a new head by its names in an adapter's file: random as transformers begins one, without a bias."""
        generator = torch.Generator().manual_seed(seed)
        head = {}
        for name, shape in self.shapes.items():
            if not self._is_last(name):
                value = self.tables[name][0].detach().reshape(shape).cpu()
            elif len(shape) == 1:  # a bias
                value = torch.zeros(n_labels)
            else:
                value = 0.02 * torch.randn((n_labels, *shape[1:]), generator=generator)
            head[self.prefix + name] = value
        return head

    def rows(self, slots: Sequence[int], device: torch.device) -> HeadRows:
        """Return the heads of the rows of a batch, which have these slots."""
        at = torch.tensor(slots, device=device)
        parameters = {
            name: take(table, at).unflatten(1, self.shapes[name]) for name, table in self.tables.items()
        }
        labels = [self.n_labels[slot] for slot in slots]
        regression = torch.tensor([self.regression[slot] for slot in slots], device=device)
        return HeadRows(parameters, torch.tensor(labels, device=device), regression, max(labels))

    def reserve(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Make every head in memory at least as large as these shapes."""
        for name, shape in shapes.items():
            have = self.shapes[name]
            need = tuple(max(a, b) for a, b in zip(have, shape, strict=True))
            if need != have:
                table = self.tables[name].unflatten(1, have)
                self.tables[name] = F.pad(table, _padding(have, need)).flatten(1)
                self.shapes[name] = need

    def to(self, device: torch.device) -> None:
        """Move the heads."""
        self.tables = {name: table.to(device) for name, table in self.tables.items()}

    @property
    def bytes_a_task(self) -> int:
        """Bytes of one head in memory."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())

    @torch.no_grad()
    def _write(self, slot: int, own: dict[str, Tensor], regression: bool) -> None:
        self.reserve({name: tuple(value.shape) for name, value in own.items()})
        for name, value in own.items():
            shape = self.shapes[name]
            self.tables[name][slot] = F.pad(
                value.to(self.tables[name]), _padding(value.shape, shape)
            ).flatten()
            if self._is_last(name):
                self.n_labels[slot] = len(value)
        self.regression[slot] = regression

    def _is_last(self, name: str) -> bool:
        return name.rpartition(".")[0] == self._last


def _padding(have: Sequence[int], need: Sequence[int]) -> list[int]:
    """Return what `torch.nn.functional.pad` adds to the end of every axis."""
    return [n for a, b in reversed(list(zip(have, need, strict=True))) for n in (0, b - a)]


class RowHead(nn.Module):
    """A head whose parameters can be different in every row of a batch.

    Args:
        head: The head of the base model, in use while no rows are selected.
        current: Tells the rows of the call that runs.
    """

    def __init__(self, head: nn.Module, current: RowsOfCall) -> None:
        super().__init__()
        self.head = head
        self.current = current

    def forward(self, x: Tensor) -> Tensor:  # (m·rows, *n, in) -> (m·rows, *n, width)
        """Return logits; those of labels that a row's task does not have are the lowest number there is."""
        selected = self.current.get()
        own = None if selected is None else selected.head
        if own is None:
            logits: Tensor = self.head(x)
            return logits
        rows = len(own.n_labels)
        # in float32 on a half-precision base too, as heads are trained
        x = x.float().unflatten(0, (rows, -1))

        # a call writes the parameters of its rows into a head of its own, which has the tensors of this one
        tensors = (*self.head.parameters(), *self.head.buffers())
        head = copy.deepcopy(self.head, {id(tensor): tensor for tensor in tensors})

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            logits: Tensor = functional_call(head, parameters, (x,))
            return logits

        logits = torch.vmap(one, randomness="different")(own.parameters, x)[..., : own.width]
        known = torch.arange(own.width, device=x.device) < own.n_labels[:, None]
        known = known.view(rows, *[1] * (logits.dim() - 2), -1)
        return logits.masked_fill(~known, torch.finfo(logits.dtype).min).flatten(0, 1)


def row_losses(
    logits: Tensor,  # (rows, *n, classes)
    labels: Tensor,  # (rows, *n)
    regression: Tensor | None = None,  # (rows,)
) -> Tensor:  # (rows,)
    """Return the loss of every row: cross entropy, or the squared error of a regression's only output.

    Labels of -100 take no part, as in `torch.nn.CrossEntropyLoss`.

    Example:
        >>> row_losses(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([2])
    """
    numbers = torch.zeros(len(logits), dtype=torch.bool) if regression is None else regression
    numbers = numbers.to(logits.device).view(-1, *[1] * (labels.dim() - 1))
    classes = labels.long().masked_fill(numbers, 0)
    entropy = F.cross_entropy(logits.float().movedim(-1, 1), classes, reduction="none", ignore_index=-100)
    error = (logits[..., 0].float() - labels.float()).square()
    losses = torch.where(numbers, error, entropy).reshape(len(logits), -1)
    taking_part = (labels != -100).reshape(len(logits), -1)
    return losses.sum(1) / taking_part.sum(1).clamp_min(1)
