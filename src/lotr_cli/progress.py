"""A progress bar for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .console import calm, err, say


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, the last score and the time that is left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._scores: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if not state.is_world_process_zero:
            return
        calm()
        columns = (
            BarColumn(30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=err, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the newest loss and scores."""
        if self._bar is None:
            return
        shown = {"loss", "eval_loss", "eval_accuracy", "eval_pearson"}
        self._scores |= {k: float(v) for k, v in (logs or {}).items() if k in shown}
        if not err.is_terminal and any(name.startswith("eval_") for name in logs or {}):
            # a log file shows no bar
            say(f"Step {state.global_step} of {state.max_steps}: " + self._line())
        self._bar.update(self._task, description=self._line())

    def _line(self) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in self._scores.items())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also when the run failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def training_progress() -> Iterator[TrainingProgress]:
    """Give the callback that shows a bar, which goes when the block ends."""
    bar = TrainingProgress()
    try:
        yield bar
    finally:
        bar.close()
