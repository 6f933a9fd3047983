"""The command line, and training runs, called in this process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from typer.testing import CliRunner

from lotr.training.settings import TrainSettings
from lotr_cli.app import app

QUICK = (
    *("--epochs", "10", "--batch-size", "8", "--rank", "4"),
    *("--lr", "3e-2", "--core-lr", "3e-2", "--head-lr", "3e-2"),
)


def lotr(*words: str | Path) -> Any:
    """Run a command in a wide terminal."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def report(*words: str | Path) -> dict[str, Any]:
    """Run a command that must succeed, and return its report."""
    result = lotr(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(code: int, *words: str | Path) -> str:
    """Run a command that must fail, and return its message."""
    result = lotr(*words)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert not result.stdout and "Traceback" not in result.stderr
    assert "Unexpected" not in result.stderr, result.stderr
    return " ".join(result.stderr.split())


def training(place: Path, *, eval: bool = True) -> tuple[str | Path, ...]:
    """The words that train the model of the fixture `place` on its rows."""
    measured = ("--eval", place / "dev.csv") if eval else ()
    return ("train", "--model", place / "bert", "--train", place / "train.csv", *measured)


def settings(place: Path, output: Path, **more: object) -> TrainSettings:
    """A run of ten steps on 48 rows, measured and saved at every third."""
    quick = {"rank": "2", "max_steps": 10, "batch_size": 8, "eval_steps": 3, **more}
    return TrainSettings(model=str(place / "bert"), train=str(place / "dev.csv"), output=str(output), **quick)


def quiet(line: str) -> None:
    """Say nothing."""


class CtrlC(TrainerCallback):
    """Presses ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
