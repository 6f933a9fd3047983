"""Heads of tasks: every row of a batch goes through the head of its own task, and has logits of its own labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import CheckpointError, DataError
from ..tuner.batch_cores import HeadRows, RowsOfCall
from .head_form import ROOT, head_form, n_outputs, output_names
from .task import Task

#: Where transformers' models have the head of a task; PEFT trains and saves modules of these names in full.
NAMES = ("classifier", "score")


@dataclass(frozen=True)
class Head:
    """A head in memory."""

    parameters: Mapping[str, Tensor]  # by their names in the head
    outputs: int  # how many labels it tells, or 1
    regression: bool = False  # whether the only output is a number


class RowHead(nn.Module):
    """The head that a base model has at a path, with other parameters in every row where rows are selected."""

    def __init__(self, path: str, head: nn.Module, current: RowsOfCall) -> None:
        super().__init__()
        self.path, self.prefix = path, f"{ROOT}{path}."
        self.head = head
        self.current = current

    @property
    def of_base(self) -> Head:
        """The head of the base model, in float32."""
        own = {name: p.detach().float() for name, p in self.head.named_parameters()}
        return Head(own, n_outputs(own))

    def of(self, task: Task, device: torch.device) -> Head | None:
        """Return the head of a task, in float32, or nothing where it has none."""
        if not task.head:
            return None
        base = self.of_base.parameters
        form, expected = (
            head_form(head) for head in (task.head, {self.prefix + name: p for name, p in base.items()})
        )
        if form != expected:
            raise CheckpointError(
                f"The head of task {task.name!r} is not that of this base model: it is {form}, and not {expected}. "
                "Use the kind of model that the task was trained on."
            )
        own = {name: task.head[self.prefix + name].to(device, torch.float32) for name in base}
        return Head(own, n_outputs(own), task.task == "regression")

    def fresh(self, outputs: int, seed: int) -> dict[str, Tensor]:
        """Return a new head by its names in an adapter's file: random as transformers begins one, without a bias."""
        generator = torch.Generator().manual_seed(seed)
        head = {self.prefix + name: p.cpu() for name, p in self.of_base.parameters.items()}
        for name in output_names(head):
            shape = (outputs, *head[name].shape[1:])
            head[name] = 0.02 * torch.randn(shape, generator=generator) if shape[1:] else torch.zeros(shape)
        return head

    def forward(self, x: Tensor) -> Tensor:  # (m·rows, *n, in) -> (m·rows, *n, outputs)
        """Return logits; those of labels that a row's task does not have are the lowest number there is."""
        rows = self.current.get()
        logits: Tensor = self.head(x) if rows is None or rows.head is None else self._by_row(x, rows.head)
        return logits

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # other tasks have other shapes
    def _by_row(self, x: Tensor, own: HeadRows) -> Tensor:
        rows = len(own.outputs)
        # in float32 on a half-precision base too, as heads are trained
        x = x.float().unflatten(0, (rows, -1))

        # a call writes the parameters of its rows into a head of its own, which has the tensors of this one
        tensors = (*self.head.parameters(), *self.head.buffers())
        head = copy.deepcopy(self.head, {id(tensor): tensor for tensor in tensors})

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            logits: Tensor = functional_call(head, parameters, (x,))
            return logits

        several = torch.vmap(one, randomness="different")
        parts = [(at, several(parameters, x[at])) for at, parameters in own.groups]
        first = parts[0][1]
        logits = first.new_full((rows, *first.shape[1:-1], own.width), torch.finfo(first.dtype).min)
        for at, part in parts:
            logits[at, ..., : part.shape[-1]] = part
        return logits.flatten(0, 1)


def side_by_side(heads: Sequence[Head]) -> HeadRows:
    """Return the heads of the rows of a batch, those with as many outputs beside each other."""
    rows: dict[int, list[int]] = {}
    for row, head in enumerate(heads):
        rows.setdefault(head.outputs, []).append(row)
    names = heads[0].parameters
    device = next(iter(names.values())).device
    groups = [
        (
            torch.tensor(at, device=device) if len(rows) > 1 else slice(None),
            {name: torch.stack([heads[row].parameters[name] for row in at]) for name in names},
        )
        for at in rows.values()
    ]
    outputs = torch.tensor([head.outputs for head in heads], device=device)
    regression = torch.tensor([head.regression for head in heads], device=device)
    return HeadRows(groups, outputs, regression, max(rows))


def row_losses(
    logits: Tensor,  # (rows, *n, classes)
    labels: Tensor,  # (rows, *n)
    heads: HeadRows | None = None,
) -> Tensor:  # (rows,)
    """Return the loss of every row: cross entropy, or the squared error of a regression's only output.

    Labels of -100 take no part, as in `torch.nn.CrossEntropyLoss`.

    Example:
        >>> row_losses(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([2])
    """
    labels = labels.reshape(logits.shape[:-1])
    classes, ignored = labels.long(), labels == -100
    if heads is None:
        losses = _entropy(logits, classes)
    else:
        like = (-1, *[1] * (labels.dim() - 1))
        is_number, outputs = heads.regression.view(like), heads.outputs.view(like)
        known = ignored | is_number | (classes == labels) & (classes >= 0) & (classes < outputs)
        if not known.all():
            row = int((~known).nonzero()[0, 0])
            raise DataError(
                f"Row {row} has the label {float(labels[~known][0]):g}, and its task has labels from 0 to "
                f"{int(heads.outputs[row]) - 1}. Give each row a label of its own task, or -100."
            )
        error = (logits[..., 0].float() - labels.float()).square()
        losses = torch.where(is_number, error, _entropy(logits, classes.masked_fill(is_number, 0)))
        ignored = ignored & ~is_number
    taking_part = (~ignored).reshape(len(logits), -1).sum(1)
    return losses.reshape(len(logits), -1).sum(1) / taking_part.clamp_min(1)


def _entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().movedim(-1, 1), classes, reduction="none", ignore_index=-100)
