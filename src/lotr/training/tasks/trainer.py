"""transformers' Trainer for many tasks at once: batches mixed from all of them, checkpoints into the bank."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...bank import CoreBank
from ...bank.heads import row_losses
from ...errors import TrainingError
from ..checkpoint import TRAINER_STATE, AdapterTrainer
from .sampler import TaskSampler
from .window import Window

CHECKPOINT = f"{PREFIX_CHECKPOINT_DIR}-0"


class TaskTrainer(AdapterTrainer):
    """Trains the tasks of a bank on a model that `CoreBank.wrap` made.

    The loss of a batch is the sum over its tasks of the mean over the task's rows, so that a task's gradient does not
    depend on which others are in the batch.

    Args:
        bank: Open for writing; brought up to date at every checkpoint.
        window: The tasks that train.
        names: Names of the tasks by their number in the rows.
        sampler: Which rows come.
    """

    def __init__(
        self,
        *args: Any,
        bank: CoreBank,
        window: Window,
        names: Sequence[str],
        sampler: TaskSampler,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bank, self.window, self.names, self.sampler = bank, window, names, sampler
        self.data_collator = _WithTasks(self.data_collator)
        self._in_batch = 1

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take one step; returns the mean loss of the tasks in the batch."""
        return super().training_step(model, inputs, *args, **kwargs) / self._in_batch

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch.

        Raises:
            TrainingError: The loss of a task is NaN or infinite; the message names it.
        """
        inputs = dict(inputs)
        names = [self.names[n] for n in inputs.pop("task")]
        labels = inputs.pop("labels")
        self.window.changed(names)
        tasks = self.accelerator.unwrap_model(model).base_model.tasks
        with tasks.select(names):
            logits = model(**inputs).logits
            losses = (
                row_losses(logits[:, :-1], labels[:, 1:])
                if labels.dim() == 2
                else tasks.losses(logits, labels)
            )
        bad = sorted(
            {name for name, loss in zip(names, losses.tolist(), strict=True) if not abs(loss) < torch.inf}
        )
        if bad:
            step = self.state.global_step + 1
            raise TrainingError(
                self._diverged(f"The loss of task {', '.join(map(repr, bad[:5]))} is not finite", step)
            )
        rows = Counter(names)
        self._in_batch = len(rows)
        return (losses / torch.tensor([rows[name] for name in names], device=losses.device)).sum()

    def _diverged(self, what: str, step: int) -> str:
        saved = self.window.last()
        kept = (
            f"The bank has the tasks as of step {saved[0]['step']}."
            if saved
            else "No checkpoint was written before."
        )
        return f"{what} at step {step}. {kept} Lower the learning rates, or look for bad rows in the data."

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.lr_scheduler is not None and self.optimizer is not None  # a step was taken
        scheduler = {
            k: v for k, v in self.lr_scheduler.state_dict().items() if isinstance(v, int | float | list)
        }
        content = {
            "step": self.state.global_step,
            "trainer": asdict(self.state),
            "scheduler": scheduler,
            "rates": [group["lr"] for group in self.optimizer.param_groups],
        }
        tensors = {"rng.torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        self.window.checkpoint(self.bank, content, tensors)

    def resume(self) -> str | None:
        """Return the folder to go on from, or nothing where the run has no checkpoint yet."""
        saved = self.window.last()
        if saved is None:
            return None
        folder = Path(str(self.args.output_dir)) / CHECKPOINT
        folder.mkdir(exist_ok=True)
        (folder / TRAINER_STATE).write_text(json.dumps(saved[0]["trainer"]), encoding="utf-8")
        return str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: tasks come from the window when they are first used."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saved = self.window.last() if checkpoint else None
        if saved is not None:
            assert self.lr_scheduler is not None and self.optimizer is not None  # made just before
            self.lr_scheduler.load_state_dict(saved[0]["scheduler"])
            for group, rate in zip(self.optimizer.param_groups, saved[0]["rates"], strict=True):
                group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        saved = self.window.last() if checkpoint else None
        if saved is not None:
            torch.set_rng_state(saved[1]["rng.torch"])
            if "rng.cuda" in saved[1] and torch.cuda.is_available():
                torch.cuda.set_rng_state(saved[1]["rng.cuda"])


class _WithTasks:
    """Keeps the task's number of each row beside the batch that a collator makes."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), "task": [row["task"] for row in rows]}
