"""A trained adapter put back on its base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bank.folder import BANK
from ..errors import CheckpointError
from ..files.adapter_folder import CONFIG, AdapterFolder, fingerprint, read_adapter
from .adapter import full_precision_head
from .base_model import load_model, load_tokenizer, locate
from .data import Columns, Task
from .report import CHECKPOINTS

if TYPE_CHECKING:
    from peft import PeftModel


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
    adapted: Any = loaded.base_model
    found = fingerprint(bare, sorted(adapted.targeted_module_names))
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
