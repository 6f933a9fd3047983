"""Every setting of a run that trains many tasks at once, described once; imports what `lotr.training.settings` may."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..settings import Settings, setting

_DATA, _TRAINING, _RUN = "Model and data", "Training", "Run"


@dataclass(frozen=True)
class BankSettings(Settings):
    """What `lotr bank train` and `lotr bank add --train` are told."""

    output: str | None = setting(None, _DATA, "Folder of the bank; made when it is not there.", "required")
    basis: str | None = setting(
        None, _DATA, "Adapter whose factors a new bank gets.", "required for a new bank"
    )
    model: str | None = setting(None, _DATA, "Base model.", "default: the one of the basis")
    max_length: int | None = setting(
        None, _DATA, "Longest text, in tokens.", "default: 128, or as many as the model takes"
    )
    keep: str = setting(
        "bfloat16", _DATA, "Type in which a new bank keeps its tasks: float32, bfloat16 or float16."
    )

    epochs: float = setting(3.0, _TRAINING, "Passes over the rows of all tasks.")
    max_steps: int | None = setting(None, _TRAINING, "Steps, instead of epochs.", "default: by epochs")
    batch_size: int = setting(32, _TRAINING, "Rows a step, of any tasks.")
    sampling: str = setting(
        "proportional", _TRAINING, "Share of a task in the batches: proportional, uniform or temperature."
    )
    temperature: float = setting(2.0, _TRAINING, "With temperature: a task takes size^(1/temperature).")
    core_lr: float | None = setting(None, _TRAINING, "Learning rate of the cores.", "default: by core")
    head_lr: float | None = setting(None, _TRAINING, "Learning rate of new heads.", "default: by core")
    warmup: float = setting(0.06, _TRAINING, "Share of the steps in which the rates rise.")
    weight_decay: float = setting(0.0, _TRAINING, "Weight decay of AdamW.")
    dtype: str = setting("float32", _TRAINING, "Type of the base model: float32, bfloat16, float16.")
    seed: int = setting(0, _TRAINING, "Seed of everything random.")

    save_steps: int | None = setting(None, _RUN, "Steps between checkpoints.", "default: five a run")
    resume: bool = setting(False, _RUN, "Go on from the last checkpoint of the run in OUTPUT.")
    replace: bool = setting(False, _RUN, "Train tasks anew that the bank has, and drop an unfinished run.")

    #: The tasks, as plain values; see `lotr.training.tasks.task_list.TaskSource`.
    tasks: tuple[dict[str, Any], ...] = field(default=(), metadata={"panel": ""})
