"""The process that a run is in: its device, its place among others, ctrl-C, its memory."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


def device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def n_processes() -> int:
    """Return how many processes a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave_processes() -> None:
    """Leave the other processes of a run; threads of their group that outlive the program abort it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def peak_memory() -> int:
    """Return the most bytes that were in use: of the accelerator, or else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class StopOnInterrupt(TrainerCallback):
    """In its `with` block, the first ctrl-C ends the run after the current step, with a checkpoint.

    A second one stops at once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.requested = say, False
        self._before: dict[int, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end."""
        if self.requested:
            control.should_save = control.should_training_stop = True

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # signals come to no other
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._request) for number in numbers}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.say("Stopping after this step, with a checkpoint. Press ctrl-C again to stop at once.")
