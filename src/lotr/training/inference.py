"""Rows of data through a model: logits in batches, their scores, what they predict, and answers that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import metrics
from .data.columns import TaskRecord
from .data.conversations import CHAT, IGNORED, Chat
from .data.encode import LENGTH

if TYPE_CHECKING:
    from datasets import Dataset

Tick = Callable[[int, int], None]  # rows done, rows in all


def outputs(
    model: Any,  # in PEFT, or with a bank: what is called is not in the type of either
    collate: Callable[[list[Any]], dict[str, Tensor]],
    rows: Dataset,
    batch_size: int,
    tick: Tick | None = None,
    tasks: Sequence[str] = (),
) -> Iterator[tuple[int, Tensor, Any]]:
    """Yield of each encoded row its number, its logits in float32, and its label where it has one.

    Long rows run with long ones, so that little is padded; the column `task` numbers a bank's `tasks`.
    """
    lengths = rows[LENGTH][:]
    order = sorted(range(len(rows)), key=lambda n: -lengths[n])
    for at in range(0, len(order), batch_size):
        numbers = order[at : at + batch_size]
        inputs = {name: value.to(model.device) for name, value in collate([rows[n] for n in numbers]).items()}
        labels: Any = inputs.pop("labels", None)
        own = inputs.pop("task", None)
        named = {"task_ids": [tasks[n] for n in own.tolist()]} if tasks and own is not None else {}
        with torch.inference_mode():
            logits = model(**inputs, **named).logits.float()
        labels = [None] * len(numbers) if labels is None else labels
        if logits.dim() == 2:
            logits, labels = logits.cpu(), [label if label is None else label.cpu() for label in labels]
        yield from zip(numbers, logits, labels, strict=True)
        if tick is not None:
            tick(at + len(numbers), len(order))


def measured(
    model: Any,  # as in `outputs`
    collate: Callable[[list[Any]], dict[str, Tensor]],
    task: TaskRecord,
    rows: Dataset,
    batch_size: int = 64,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Return how many encoded rows with labels there are, their scores, and of classes the confusion counts."""
    of_rows = outputs(model, collate, rows, batch_size, tick)
    if task.task == "causal-lm":
        total, tokens = 0.0, 0
        for _, logits, labels in of_rows:
            total += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
            tokens += int((labels[1:] != IGNORED).sum())
        loss = total / max(tokens, 1)
        return {"rows": len(rows), "loss": loss, "perplexity": metrics.perplexity(loss), "tokens": tokens}
    _, scores, targets = map(np.stack, zip(*of_rows, strict=True))
    report = {"rows": len(rows), **metrics.measure(task.task, scores, targets)}
    if task.task == "regression":
        return report
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(targets, scores.argmax(-1), labels=range(scores.shape[-1]))
    return report | {"confusion": counts.tolist()}


def prediction(task: str, labels: Sequence[str], logits: Tensor) -> dict[str, Any]:
    """Return what the logits `(outputs,)` of a row predict; of a class also how probable it is."""
    if task == "regression":
        return {"prediction": float(logits[0])}
    shares = torch.softmax(logits[: len(labels)], -1)
    return {"prediction": labels[int(shares.argmax())], "confidence": round(float(shares.max()), 6)}


def answers(
    model: Any,  # a transformers model in PEFT, or with a bank
    tokenizer: Any,
    rows: Mapping[int, dict[str, Any]],
    max_new_tokens: int,
    tick: Tick | None = None,
    tasks: Sequence[str] = (),
) -> dict[int, dict[str, Any]]:
    """Return by its number the answer to each row, to its `text` or last question, by its task of `tasks`."""
    written: dict[int, dict[str, Any]] = {}
    for n, row in rows.items():
        is_chat = CHAT in row
        text = Chat(tokenizer, row[CHAT], n + 1).prompt() if is_chat else row["text"]
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not is_chat).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode(), model.select([tasks[n]]) if tasks else nullcontext():
            tokens = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        written[n] = {"prediction": tokenizer.decode(new, skip_special_tokens=True)}
        if tick is not None:
            tick(len(written), len(rows))
    return written
