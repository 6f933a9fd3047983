"""The tasks of `quality.py`: rows as the model takes them, batches in an order that depends on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotr.training.base_model import load_tokenizer
from lotr.training.data import Columns, TaskData, collator, encode, load_task

COLUMNS = Columns("text", "text2", "label")
Rows = list[dict[str, Any]]
Batch = dict[str, Tensor]


class Task:
    """A task of the grid, encoded."""

    def __init__(self, task: dict[str, Any], model: str, data: Path) -> None:
        loaded = _load(task, data)
        self.kind, self.labels, self.batch_size, self.steps = (
            loaded.task,
            loaded.labels,
            task["batch_size"],
            task["steps"],
        )
        self.tokenizer = load_tokenizer(model)
        self.collate = collator(self.tokenizer, self.kind)
        if "dev" in task:
            parts = {"train": loaded.train, "dev": loaded.eval, "test": _load(task, data, "test").eval}
        else:  # a built-in set: a fifth of its training rows is dev, its own evaluation rows are test
            halves = loaded.train.train_test_split(test_size=0.2, seed=0)
            parts = {"train": halves["train"], "dev": halves["test"], "test": loaded.eval}
        self.train, self.dev, self.test = (
            list(
                encode(
                    rows.shuffle(seed=0).select(range(min(len(rows), task.get(f"{name}_rows", len(rows))))),
                    self.tokenizer,
                    self.kind,
                    COLUMNS,
                    self.labels,
                    task["max_length"],
                )
            )
            for name, rows in parts.items()
        )

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield batches of rows of like length without end, in an order that depends on the seed alone."""
        order = random.Random(seed)
        while True:
            rows = order.sample(self.train, len(self.train))
            many = 16 * self.batch_size
            chunks = []
            for at in range(0, len(rows), many):
                alike = sorted(rows[at : at + many], key=lambda row: row["length"])
                chunks += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
            order.shuffle(chunks)
            yield from (self.collate(chunk) for chunk in chunks)

    def accuracy(self, model: nn.Module, rows: Rows) -> float:
        """Return the share of rows whose class is predicted."""
        model.eval()
        right = 0
        rows = sorted(rows, key=lambda row: row["length"])
        with torch.inference_mode():
            for at in range(0, len(rows), 64):
                batch = self.collate(rows[at : at + 64])
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        model.train()
        return right / len(rows)


def _load(task: dict[str, Any], data: Path, held_out: str = "dev") -> TaskData:
    if "dev" not in task:
        return load_task(task["train"], None, COLUMNS, None, seed=0)
    return load_task(str(data / task["train"]), str(data / task[held_out]), COLUMNS, None, seed=0)
