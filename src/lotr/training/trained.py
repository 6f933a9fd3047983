"""A trained adapter put back on its base model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bank.head_form import ROOT, labels_of
from ..bank.heads import NAMES
from ..errors import CheckpointError
from ..files.adapter_folder import CONFIG, AdapterFolder, check_replaceable, read_adapter
from ..files.atomic import check_apart
from ..files.fingerprint import difference
from ..files.peft_lora import read_lora
from ..tuner.saved_adapter import read_saved
from .adapter import full_precision_head
from .base_model import load_model, load_tokenizer, longest_text
from .data.columns import Task, TaskRecord
from .process import device

if TYPE_CHECKING:
    from peft import PeftModel

#: Folder of an unfinished run inside its output.
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Trained:
    """An adapter on its base model, with what it was trained for."""

    model: PeftModel
    tokenizer: Any
    task: TaskRecord


def load_trained(path: str | Path, model: str | None = None) -> Trained:
    """Load an adapter that `lotr train` made, on the base model in evaluation mode: the recorded one, or `model`.

    One that PEFT saved tells less: its classes are `0`, `1` and so on, as its head has them, and texts are single, as
    long as the base model takes them.

    Raises:
        CheckpointError: The adapter is damaged, does not tell its task, or belongs to another base model.
        ConfigError: The base model cannot be loaded.
    """
    from peft import PeftModel, set_peft_model_state_dict

    _check_finished(Path(path))
    adapter = read_adapter(path)
    told = adapter.task.get("task") is not None  # an exported task of a bank may have a record without it
    task = TaskRecord.from_dict(adapter.task) if told else _record(adapter, model)
    tensors = adapter.tensors()  # whoever wrote them: PEFT looks at none of its own methods' numbers
    base = model or adapter.config.get("base_model_name_or_path") or task.base_model
    tokenizer = load_tokenizer(base)
    bare = load_model(base, task.task, task.labels, task.dtype, tokenizer, task.load_in)
    if not (told and task.max_length):
        task = replace(task, max_length=longest_text(bare))
    if differs := difference(task.base_fingerprint, bare):
        raise CheckpointError(
            f"The weights of {base!r} are not those that the adapter in {adapter.path} was trained on "
            f"({task.base_model!r}): {differs}. Name the right base model with --model."
        )
    try:
        loaded = PeftModel.from_pretrained(bare, str(adapter.path), is_trainable=False)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise CheckpointError(
            f"The adapter in {adapter.path} does not fit the base model {base!r}: {[*lines, str(error)][0]} Either "
            f"{CONFIG} is not the one that was saved with it: copy the folder again. Or it was trained on another "
            "model: name that one with --model."
        ) from error
    if full_precision_head(loaded).dtype != torch.float32:
        set_peft_model_state_dict(loaded, tensors)  # the head again, without rounding
    loaded = loaded.eval() if task.load_in else loaded.eval().to(device())
    return Trained(loaded, tokenizer, task)


def _record(adapter: AdapterFolder, model: str | None) -> TaskRecord:
    """Return what an adapter that PEFT saved tells of its task; CheckpointError where it does not tell it."""
    kind, base = adapter.config.get("task_type"), model or adapter.config.get("base_model_name_or_path")
    head: dict[str, Tensor] = {}
    if adapter.is_lotr:
        method, own = str(adapter.config.get("method")), read_saved(adapter).head()
    else:
        is_lora = adapter.config["peft_type"] == "LORA"
        method, own = "peft_lora", read_lora(adapter).head() if is_lora else {}
        kind = kind if is_lora else None
    head = {key: tensor for key, tensor in own.items() if key.removeprefix(ROOT).partition(".")[0] in NAMES}
    if base is None or kind not in ("CAUSAL_LM", "SEQ_CLS") or (kind == "SEQ_CLS" and not head):
        raise CheckpointError(
            f"{adapter.path} holds no task.json, so its labels and columns are not known: it was not made by "
            "`lotr train`, and has no task_type of CAUSAL_LM, or of SEQ_CLS with a head, or no base model. Load it in "
            "Python with PEFT, where model.merge_and_unload() leaves with a plain model."
        )
    if kind == "CAUSAL_LM":
        return TaskRecord("causal-lm", base_model=str(base), method=method)
    labels = labels_of(head)
    task: Task = "classification" if labels else "regression"
    return TaskRecord(task, labels, base_model=str(base), method=method)


def _check_finished(folder: Path) -> None:
    """Say of a folder that holds a bank, or a run that was stopped, how to go on with it."""
    AdapterFolder(folder, {}).check_one()
    if (folder / CHECKPOINTS).is_dir() and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"The run in {folder} was stopped before its end. Go on with: lotr train --resume --output {folder}"
        )


def merge(
    adapter: str | Path, output: str | Path, model: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a plain transformers model with a trained adapter merged into its weights.

    Args:
        adapter: Folder or hub id of an adapter that `lotr train` made.
        output: Folder to make.
        model: Base model to use instead of the recorded one.
        overwrite: Replace the folder when it is not empty.

    Returns:
        Where the model is.

    Raises:
        CheckpointError: The adapter is damaged or belongs to another base model, or merged weights are not finite.
        ConfigError: `output` is not free, or is what is read.
    """
    from ..adapters.export import merge as write_merged

    output = Path(output)
    check_replaceable(output, overwrite)
    check_apart(output, "adapter", adapter)
    check_apart(output, "base model", model)
    trained = load_trained(adapter, model)
    write_merged(trained.model, output, trained.tokenizer, overwrite)
    return {"output": str(output)}
