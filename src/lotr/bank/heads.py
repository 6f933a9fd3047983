"""Heads of tasks: every row of a batch goes through the head of its own task, and has logits of its own labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import CheckpointError
from ..tuner.batch_cores import HeadRows, RowsOfCall
from .task import Task

#: Where transformers' models have the head of a task; PEFT trains and saves modules of these names in full.
NAMES = ("classifier", "score")
_ROOT = "base_model.model."


@dataclass(frozen=True)
class Head:
    """A head in memory.

    Args:
        parameters: By their names in the head.
        outputs: How many labels it tells, or 1.
        regression: Whether the only output is a number.
    """

    parameters: Mapping[str, Tensor]
    outputs: int
    regression: bool = False


class RowHead(nn.Module):
    """A head whose parameters can be different in every row of a batch.

    Args:
        path: Where the base model has its head.
        head: That head, in use while no rows are selected.
        current: Tells the rows of the call that runs.
    """

    def __init__(self, path: str, head: nn.Module, current: RowsOfCall) -> None:
        super().__init__()
        self.prefix = f"{_ROOT}{path}."
        self.head = head
        self.current = current

    @property
    def of_base(self) -> Head:
        """The head of the base model, in float32."""
        own = {name: p.detach().float() for name, p in self.head.named_parameters()}
        return Head(own, len(own[[*own][-1]]))

    def of(self, task: Task, device: torch.device) -> Head | None:
        """Return the head of a task, in float32, or nothing where it has none.

        Raises:
            CheckpointError: It is not one of this base model.
        """
        if not task.head:
            return None
        base, own = self.of_base.parameters, {k.removeprefix(self.prefix): v for k, v in task.head.items()}
        if odd := own.keys() ^ base.keys():
            raise CheckpointError(
                f"The head of task {task.name!r} is not that of this base model at {self.prefix[len(_ROOT) : -1]!r}: "
                f"{', '.join(sorted(odd))} differ. Use the kind of model that the task was trained on."
            )
        own = {name: own[name].to(device, torch.float32) for name in base}
        return Head(own, len(own[[*own][-1]]), task.task == "regression")

    def fresh(self, outputs: int, seed: int) -> dict[str, Tensor]:
        """Return a new head by its names in an adapter's file: random as transformers begins one, without a bias."""
        generator = torch.Generator().manual_seed(seed)
        base = self.of_base.parameters
        last = [*base][-1].rpartition(".")[0]  # the linear module whose outputs are the labels
        head = {}
        for name, value in base.items():
            if name.rpartition(".")[0] != last:
                value = value.cpu()
            elif value.dim() == 1:  # a bias
                value = torch.zeros(outputs)
            else:
                value = 0.02 * torch.randn((outputs, *value.shape[1:]), generator=generator)
            head[self.prefix + name] = value
        return head

    def forward(self, x: Tensor) -> Tensor:  # (m·rows, *n, in) -> (m·rows, *n, outputs)
        """Return logits; those of labels that a row's task does not have are the lowest number there is."""
        selected = self.current.get()
        own = None if selected is None else selected.head
        if own is None:
            logits: Tensor = self.head(x)
            return logits
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
        shape = list(parts[0][1].shape)
        logits = parts[0][1].new_full((rows, *shape[1:-1], own.width), torch.finfo(torch.float32).min)
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
