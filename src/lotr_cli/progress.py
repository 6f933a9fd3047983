"""A progress bar for transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .console import err, say, tick

_SHOWN = ("loss", "eval_loss", "eval_accuracy", "eval_pearson")


class TrainingProgress(TrainerCallback):
    """Shows steps, the last loss and the last score."""

    def __init__(self) -> None:
        self._scores, self._line = dict[str, float](), ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            tick(self._line, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the newest loss and scores; a log file, which shows no bar, has a line of each evaluation."""
        logs = kwargs["logs"]
        self._scores |= {name: float(logs[name]) for name in _SHOWN if name in logs}
        self._line = "  ".join(f"{name} {value:.4f}" for name, value in self._scores.items())
        measured = any(name.startswith("eval_") for name in logs)
        if state.is_world_process_zero and measured and not err.is_terminal:
            say(f"Step {state.global_step} of {state.max_steps}: {self._line}")
