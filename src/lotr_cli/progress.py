"""A progress bar for transformers' Trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .console import calm, err, say

_SHOWN = ("loss", "eval_loss", "eval_accuracy", "eval_pearson")


class TrainingProgress(TrainerCallback, AbstractContextManager["TrainingProgress"]):
    """Shows steps, loss, the last score and the time that is left; goes when its `with` block ends."""

    def __init__(self) -> None:
        columns = BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=err, transient=True)
        self._scores: dict[str, float] = {}

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            calm()
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        for task in self._bar.task_ids:
            self._bar.update(task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the newest loss and scores."""
        logs = kwargs["logs"]
        self._scores |= {name: float(logs[name]) for name in _SHOWN if name in logs}
        line = "  ".join(f"{name} {value:.4f}" for name, value in self._scores.items())
        for task in self._bar.task_ids:
            if not err.is_terminal and any(name.startswith("eval_") for name in logs):
                # a log file shows no bar
                say(f"Step {state.global_step} of {state.max_steps}: {line}")
            self._bar.update(task, description=line)
