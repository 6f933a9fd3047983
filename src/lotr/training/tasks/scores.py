"""Scores of a bank's tasks, measured in batches mixed from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...bank import Task
from ...bank.heads import row_losses
from .. import metrics
from ..inference import batches
from .served import Served
from .task_list import together

if TYPE_CHECKING:
    from datasets import Dataset


def scores_of_tasks(served: Served, rows: Mapping[str, Dataset]) -> dict[str, dict[str, float]]:
    """Measure tasks on encoded rows with labels, all in mixed batches.

    Returns:
        Task → scores by name, and the number of rows.
    """
    names, mixed = list(rows), together(list(rows.values()))
    task_of = mixed["task"][:]
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    size = min(64, served.rows.cache.capacity)
    for numbers, logits, labels in batches(served.model, served.collator(), mixed, size, tasks=names):
        assert labels is not None
        if served.kind == "causal-lm":
            values: Any = row_losses(logits[:, :-1], labels[:, 1:]).tolist()
        else:
            values = zip(logits.cpu(), labels.cpu(), strict=True)
        for number, value in zip(numbers, values, strict=True):
            outputs[names[task_of[number]]].append(value)
    if served.kind == "causal-lm":
        return {name: {"rows": len(own), "loss": float(np.mean(own))} for name, own in outputs.items()}
    return {name: _scores(served.bank.get(name), pairs) for name, pairs in outputs.items()}


def _scores(task: Task, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    n = len(task.labels) or 1
    logits = torch.stack([logits[:n] for logits, _ in pairs]).numpy()
    labels = torch.stack([label for _, label in pairs]).numpy()
    if task.task == "regression":
        return {"rows": len(pairs), **metrics.regression(logits, labels)}
    return {"rows": len(pairs), **metrics.classification(logits, labels.astype(int))}
