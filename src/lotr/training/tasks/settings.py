"""Every setting of a run that trains many tasks at once, described once; imports what `lotr.training.settings` may."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..settings import Settings, panel

_data, _training, _run = map(panel, ("Model and data", "Training", "Run"))


@dataclass(frozen=True)
class BankSettings(Settings):
    """What `lotr bank train` and `lotr bank add --train` are told."""

    output: str | None = _data("Folder of the bank; made when it is not there.", shown="required")
    basis: str | None = _data("Adapter whose factors a new bank gets.", shown="required for a new bank")
    model: str | None = _data("Base model.", "the one of the basis")
    max_length: int | None = _data("Longest text, in tokens.", "128, or as many as the model takes")
    keep: str | None = _data("How a new bank keeps its tasks: float32, bfloat16 or float16.", "bfloat16")

    epochs: float = _training("Passes over the rows of all tasks.", default=3.0)
    max_steps: int | None = _training("Steps, instead of epochs.", "by epochs")
    batch_size: int = _training("Rows a step, of any tasks.", default=32)
    sampling: str = _training(
        "Share of a task in the batches: proportional, uniform or temperature.", default="proportional"
    )
    temperature: float = _training("With temperature: a task takes size^(1/temperature).", default=2.0)
    core_lr: float | None = _training("Learning rate of the cores.", "2e-2, less at large ranks")
    head_lr: float | None = _training("Learning rate of new heads.", "3e-2")
    warmup: float = _training("Share of the steps in which the rates rise.", default=0.06)
    weight_decay: float = _training("Weight decay of AdamW.", default=0.0)
    adam_beta2: float = _training("Decay of the second moments of AdamW.", default=0.999)
    dtype: str = _training("Type of the base model: float32, bfloat16, float16.", default="float32")
    seed: int = _training("Seed of everything random.", default=0)

    save_steps: int | None = _run("Steps between checkpoints.", "five a run")
    resume: bool = _run("Go on from the last checkpoint of the run in OUTPUT.", default=False)
    replace: bool = _run("Train tasks anew that the bank has, and drop an unfinished run.", default=False)

    #: The tasks, as plain values; see `lotr.training.tasks.task_list.TaskSource`.
    tasks: tuple[dict[str, Any], ...] = field(default=(), metadata={"panel": ""})
