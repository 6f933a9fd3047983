"""What a trained adapter says of data: scores and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..bank.layout import BANK
from ..errors import ConfigError, DataError
from . import metrics
from .data import chat_column, collator, encode, load_rows
from .trained import Trained, load_trained

if TYPE_CHECKING:
    from datasets import Dataset

Tick = Callable[[int, int], None]  # rows done, rows in all
_NEW_COLUMNS = {"prediction", "confidence"}


def evaluate(
    adapter: str | Path | Trained,
    data: str,
    *,
    model: str | None = None,
    text: str | None = None,
    text2: str | None = None,
    label: str | None = None,
    batch_size: int = 64,
    picture: str | Path | None = None,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Measure an adapter on data.

    Args:
        adapter: Folder or hub id; or what `load_trained` returned, to load it once.
        data: Data with labels: a file, folder, hub data set or `docstrings`.
        model: Base model to use instead of the recorded one.
        text: Column with the text, where it is not that of the training.
        text2: Column with the second text.
        label: Column with the label.
        batch_size: Rows at a time.
        picture: PNG file for the confusion matrix of a classifier.
        tick: Called as rows are done.

    Returns:
        Scores by name, the number of rows, the labels, and for classification the confusion counts.

    Raises:
        ConfigError: The folder of the picture does not exist.
        DataError: The data does not fit the adapter's task.
    """
    if picture is not None and not Path(picture).parent.is_dir():
        raise ConfigError(f"--picture {picture}: the folder {Path(picture).parent} does not exist.")
    columns = {"text": text, "text2": text2, "label": label}
    trained, rows = _opened(adapter, model, columns, data, need_label=True)
    report: dict[str, Any] = {"rows": len(rows), "labels": list(trained.task.labels)}
    if trained.task.task == "causal-lm":
        return report | _language_loss(trained, rows, batch_size, tick)
    scores, labels = scores_of(trained, rows, batch_size, tick, with_labels=True)
    if trained.task.task == "regression":
        return report | metrics.regression(scores, labels)
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, scores.argmax(-1), labels=range(scores.shape[-1]))
    if picture is not None:
        from ..adapters import plots

        plots.confusion(counts, trained.task.labels, Path(picture))
    return report | metrics.classification(scores, labels) | {"confusion": counts.tolist()}


def predict(
    adapter: str | Path | Trained,
    data: str,
    *,
    task: str | None = None,
    task_column: str | None = None,
    model: str | None = None,
    text: str | None = None,
    text2: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    tick: Tick | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of the data with a prediction each.

    Args:
        adapter: Folder or hub id of an adapter, or folder of a bank; or what `load_trained` returned.
        data: Data; labels are not needed.
        task: Of a bank: the task that answers all rows.
        task_column: Of a bank: column with the task that answers each row.
        model: Base model to use instead of the recorded one.
        text: Column with the text, where it is not that of the training.
        text2: Column with the second text.
        batch_size: Rows at a time.
        max_new_tokens: Longest answer of a language model, in tokens.
        tick: Called as rows are done.

    Returns:
        Rows with `prediction`, and for classification `confidence`, the probability of the predicted class.

    Raises:
        ConfigError: A task is named and the adapter is no bank, or it is one and none is named.
        DataError: The data does not fit the adapter's task.
    """
    columns = {"text": text, "text2": text2}
    if not isinstance(adapter, Trained) and (Path(adapter) / BANK).is_file():
        from .tasks.predict import predict as predict_with_bank
        from .tasks.served import load_served

        bank = load_served(adapter, model)
        return predict_with_bank(bank, data, task, task_column, columns, batch_size, max_new_tokens, tick)
    if task is not None or task_column is not None:
        raise ConfigError(f"{adapter} is no bank, so it has no tasks. Leave out --task and --task-column.")
    trained, rows = _opened(adapter, model, columns, data, need_label=False)
    clash = _NEW_COLUMNS & set(rows.column_names)
    if clash:
        raise DataError(
            f'{data} has a column "{min(clash)}" already. Rename it, so that nothing is overwritten.'
        )
    plain = [dict(row) for row in cast("Any", rows)]
    if trained.task.task == "causal-lm":
        chats = chat_column(rows, trained.task.columns)
        column = trained.task.columns.text
        texts = answers(trained.model, trained.tokenizer, plain, column, chats, max_new_tokens, tick)
        return [{**row, "prediction": text} for row, text in zip(plain, texts, strict=True)]
    scores, _ = scores_of(trained, rows, batch_size, tick)
    if trained.task.task == "regression":
        return [{**row, "prediction": float(s)} for row, s in zip(plain, scores.reshape(-1), strict=True)]
    shares = torch.softmax(torch.from_numpy(scores), -1).numpy()
    return [
        {**row, "prediction": trained.task.labels[int(p.argmax())], "confidence": round(float(p.max()), 6)}
        for row, p in zip(plain, shares, strict=True)
    ]


def _opened(
    adapter: str | Path | Trained,
    model: str | None,
    columns: dict[str, str | None],
    source: str,
    need_label: bool,
) -> tuple[Trained, Dataset]:
    """Return the adapter on its model, with other names of columns where they are given, and the rows."""
    trained = adapter if isinstance(adapter, Trained) else load_trained(adapter, model)
    task = replace(trained.task, columns=trained.task.columns.named(**columns))
    rows = load_rows(source, task.columns, task.task, task.labels, need_label)
    if task.pairs and task.columns.text2 not in rows.column_names:
        raise DataError(
            f'The adapter was trained on pairs of texts, and {source} has no column "{task.columns.text2}"; its '
            f"columns are: {', '.join(rows.column_names)}. Add the second text."
        )
    return replace(trained, task=task), rows


def scores_of(
    trained: Trained, rows: Dataset, batch_size: int = 64, tick: Tick | None = None, with_labels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `(n, classes)` (or predictions `(n, 1)`) and labels `(n,)` in the order of the rows."""
    logits, labels, order = [], [], []
    with torch.inference_mode():
        for indices, batch in _batches(trained, rows, batch_size, with_labels, tick):
            targets = batch.pop("labels", None)
            logits.append(trained.model(**batch).logits.float().cpu())
            labels.append(torch.zeros(len(indices)) if targets is None else targets.cpu())
            order += indices
    back = np.argsort(np.array(order))
    return torch.cat(logits).numpy()[back], torch.cat(labels).numpy()[back]


def _language_loss(trained: Trained, rows: Dataset, batch_size: int, tick: Tick | None) -> dict[str, float]:
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for _, batch in _batches(trained, rows, batch_size, True, tick):
            learned = int((batch["labels"][:, 1:] != -100).sum())
            total += float(trained.model(**batch).loss) * learned
            tokens += learned
    loss = total / max(tokens, 1)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "tokens": tokens}


def _batches(
    trained: Trained, rows: Dataset, batch_size: int, with_labels: bool, tick: Tick | None
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield indices of rows and batches, long rows with long rows, so that little is padded."""
    task, tokenizer = trained.task, trained.tokenizer
    if not task.pairs and task.columns.text2 in rows.column_names:
        rows = rows.remove_columns(task.columns.text2)
    encoded = encode(rows, tokenizer, task.task, task.columns, task.labels, task.max_length, with_labels)
    collate = collator(tokenizer, task.task)
    lengths = encoded["length"][:]
    order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
    for at in range(0, len(order), batch_size):
        indices = order[at : at + batch_size]
        batch = collate([encoded[i] for i in indices])
        yield indices, {name: value.to(trained.model.device) for name, value in batch.items()}
        if tick is not None:
            tick(min(at + batch_size, len(order)), len(order))


def answers(
    model: Any,  # a transformers model, bare or in PEFT: what generates is not in the type of either
    tokenizer: Any,
    rows: list[dict[str, Any]],
    text: str,
    chats: str | None,
    max_new_tokens: int,
    tick: Callable[[int, int], None] | None,
) -> Iterator[str]:
    """Yield the answer to each row: to its column `text`, or to the last question of the conversation in `chats`."""
    for n, row in enumerate(rows, 1):
        if chats is not None:
            # Arrow gives every turn every key
            turns = [{key: value for key, value in turn.items() if value is not None} for turn in row[chats]]
            asked = turns[: max((i for i, t in enumerate(turns) if t["role"] != "assistant"), default=-1) + 1]
            if not asked:
                raise DataError(f"Row {n} holds only answers; there is nothing to answer to. Drop it.")
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = tokenizer(row[text], return_tensors="pt")
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        yield tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if tick is not None:
            tick(n, len(rows))
