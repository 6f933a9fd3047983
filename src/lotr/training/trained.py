"""A trained adapter put back on its base model: evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..bank.folder import BANK
from ..checkpoint import CONFIG, AdapterFolder, fingerprint, read_adapter
from ..errors import CheckpointError, DataError
from . import metrics
from .adapt import full_precision_head
from .answers import answers
from .data import Columns, Task, chat_column, load_rows
from .encode import collator, encode
from .models import load_model, load_tokenizer, locate
from .report import CHECKPOINTS

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

Tick = Callable[[int, int], None]  # rows done, rows in all


@dataclass
class Trained:
    """An adapter on its base model, with what it was trained for."""

    adapter: AdapterFolder
    model: PeftModel
    tokenizer: Any
    task: Task
    labels: tuple[str, ...]
    columns: Columns
    pairs: bool
    max_length: int


def load_trained(path: str | Path, model: str | None = None, dtype: str | None = None) -> Trained:
    """Load an adapter that `lotr train` made, and its base model.

    Args:
        path: Folder or hub id of the adapter.
        model: Base model to use instead of the recorded one.
        dtype: Type of the base model; default: the one it was trained in.

    Returns:
        The model in evaluation mode, and the task.

    Raises:
        CheckpointError: The adapter is damaged, does not tell its task, or belongs to another base model.
        ConfigError: The base model cannot be loaded.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _check_finished(Path(path))
    adapter = read_adapter(path)
    if not adapter.task:
        raise CheckpointError(
            f"{adapter.path} holds no task.json, so its labels and columns are not known: it was not made by "
            "`lotr train`. Load it in Python with PEFT."
        )
    task = adapter.task
    base = model or adapter.config.get("base_model_name_or_path") or task["base_model"]
    tokenizer = load_tokenizer(base)
    labels = tuple(task["labels"])
    bare = load_model(base, task["task"], labels, dtype or task.get("dtype", "float32"), tokenizer)
    try:
        loaded = PeftModel.from_pretrained(bare, str(adapter.path), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = next(
            (line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error)
        )
        other = locate(base)[1] != task["base_model"]
        raise CheckpointError(
            f"The adapter in {adapter.path} does not fit the base model {base!r}: {reason} "
            + (
                f"It was trained on {task['base_model']!r}; name that one with --model."
                if other
                else f"It was trained on that model, so {CONFIG} is not the one that was saved with it, or the model "
                "has changed. Copy the folder again."
            )
        ) from error
    if full_precision_head(loaded).dtype != torch.float32:
        set_peft_model_state_dict(loaded, adapter.tensors())  # the head again, without rounding
    found = fingerprint(bare, sorted(loaded.base_model.targeted_module_names))
    if task.get("base_fingerprint") and found and found != task["base_fingerprint"]:
        raise CheckpointError(
            f"The weights of {base!r} are not those that the adapter in {adapter.path} was trained on "
            f"({task['base_model']!r}): fingerprint {found}, not {task['base_fingerprint']}. Name the right base "
            "model with --model."
        )
    columns = Columns(**task["columns"])
    return Trained(
        adapter,
        loaded.eval().to(device()),
        tokenizer,
        task["task"],
        labels,
        columns,
        bool(task.get("pairs")),
        task["max_length"],
    )


def _check_finished(folder: Path) -> None:
    """Say of a folder that holds something else than an adapter what it holds.

    Raises:
        CheckpointError: It is a bank, or a run that was stopped.
    """
    if (folder / BANK).is_file():
        raise CheckpointError(
            f"{folder} is a bank of tasks, not an adapter. `lotr predict {folder} --task NAME` answers with one of "
            f"them, and `lotr bank export {folder} NAME --output FOLDER` writes it as an adapter."
        )
    if (folder / CHECKPOINTS).is_dir() and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"The run in {folder} was stopped before its end. Go on with: lotr train --resume --output {folder}"
        )


def device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


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
    # measuring on what an adapter may have been trained on says little
    split = "test" if source == "docstrings" else None
    rows = load_rows(source, trained.columns, trained.task, trained.labels, need_label, split)
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
