"""What a trained adapter says of data: scores and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..errors import DataError
from . import metrics
from .data import chat_column, collator, encode, load_rows
from .generate import answers
from .trained import Trained

if TYPE_CHECKING:
    from datasets import Dataset

Tick = Callable[[int, int], None]  # rows done, rows in all


def evaluate(trained: Trained, source: str, batch_size: int = 64, tick: Tick | None = None) -> dict[str, Any]:
    """Measure an adapter on data.

    Args:
        trained: See `load_trained`.
        source: Data with labels.
        batch_size: Rows at a time.
        tick: Called as rows are done.

    Returns:
        Scores by name, the number of rows, and for classification the confusion counts.

    Raises:
        DataError: The data does not fit the adapter's task.
    """
    rows = _rows(trained, source, need_label=True)
    if trained.task == "causal-lm":
        return {"rows": len(rows), **_language_loss(trained, rows, batch_size, tick)}
    scores, labels = scores_of(trained, rows, batch_size, tick, with_labels=True)
    report: dict[str, Any] = {"rows": len(rows)}
    if trained.task == "regression":
        return report | metrics.regression(scores, labels)
    counts = np.zeros((len(trained.labels),) * 2, dtype=int)
    np.add.at(counts, (labels.astype(int), scores.argmax(-1)), 1)
    return report | metrics.classification(scores, labels) | {"confusion": counts.tolist()}


def _rows(trained: Trained, source: str, need_label: bool) -> Dataset:
    rows = load_rows(source, trained.columns, trained.task, trained.labels, need_label)
    second = trained.columns.text2
    if trained.pairs and second not in rows.column_names:
        raise DataError(
            f'The adapter was trained on pairs of texts, and {source} has no column "{second}"; its columns are: '
            f"{', '.join(rows.column_names)}. Add the second text."
        )
    return rows


def scores_of(
    trained: Trained, rows: Dataset, batch_size: int = 64, tick: Tick | None = None, with_labels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `(n, classes)` (or predictions `(n, 1)`) and labels `(n,)` in the order of the rows."""
    logits, labels, order = [], [], []
    with torch.inference_mode():
        for places, batch in _batches(trained, rows, batch_size, with_labels, tick):
            given = batch.pop("labels", None)
            logits.append(trained.model(**batch).logits.float().cpu())
            labels.append(torch.zeros(len(places)) if given is None else given.cpu())
            order += places
    back = np.argsort(np.array(order))
    return torch.cat(logits).numpy()[back], torch.cat(labels).numpy()[back]


def _language_loss(trained: Trained, rows: Dataset, batch_size: int, tick: Tick | None) -> dict[str, float]:
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for _, batch in _batches(trained, rows, batch_size, True, tick):
            logits = trained.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            )
            tokens += int((labels != -100).sum())
    loss = total / max(tokens, 1)
    return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), "tokens": tokens}


def _batches(
    trained: Trained, rows: Dataset, batch_size: int, with_labels: bool, tick: Tick | None
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield places and batches, long rows with long rows, so that little is padded."""
    if not trained.pairs and trained.columns.text2 in rows.column_names:
        rows = rows.remove_columns(trained.columns.text2)
    encoded = encode(
        rows,
        trained.tokenizer,
        trained.task,
        trained.columns,
        trained.labels,
        trained.max_length,
        with_labels,
    )
    collate = collator(trained.tokenizer, trained.task)
    lengths = encoded["length"][:]
    order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
    for at in range(0, len(order), batch_size):
        places = order[at : at + batch_size]
        batch = collate([encoded[i] for i in places])
        yield places, {name: value.to(trained.model.device) for name, value in batch.items()}
        if tick is not None:
            tick(min(at + batch_size, len(order)), len(order))


def predict(
    trained: Trained, source: str, batch_size: int = 64, max_new_tokens: int = 64, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """Return the rows of the data with a prediction each.

    Args:
        trained: See `load_trained`.
        source: Data; labels are not needed.
        batch_size: Rows at a time.
        max_new_tokens: Longest answer of a language model, in tokens.
        tick: Called as rows are done.

    Returns:
        Rows with `prediction`, and for classification `confidence`, the probability of the predicted class.

    Raises:
        DataError: The data does not fit the adapter's task.
    """
    rows = _rows(trained, source, need_label=False)
    clash = {"prediction", "confidence"} & set(rows.column_names)
    if clash:
        raise DataError(
            f'{source} has a column "{min(clash)}" already. Rename it, so that nothing is overwritten.'
        )
    plain = [dict(row) for row in cast("Any", rows)]
    if trained.task == "causal-lm":
        chats = chat_column(rows, trained.columns)
        texts = answers(
            trained.model, trained.tokenizer, plain, trained.columns.text, chats, max_new_tokens, tick
        )
        return [{**row, "prediction": text} for row, text in zip(plain, texts, strict=True)]
    scores, _ = scores_of(trained, rows, batch_size, tick)
    if trained.task == "regression":
        return [{**row, "prediction": float(s)} for row, s in zip(plain, scores.reshape(-1), strict=True)]
    shares = torch.softmax(torch.from_numpy(scores), -1).numpy()
    return [
        {**row, "prediction": trained.labels[int(p.argmax())], "confidence": round(float(p.max()), 6)}
        for row, p in zip(plain, shares, strict=True)
    ]
