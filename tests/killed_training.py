"""Trains a bank in forked children that are killed at random points, and checks the bank after each.

Called with the settings as JSON and the number of children; prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (everything is imported once, before children are made)
import torch
import transformers

from lotr import CoreBank
from lotr.errors import LotrError
from lotr.training.checkpoint import last_whole
from lotr.training.tasks import run as train_bank
from lotr.training.tasks.settings import BankSettings

torch.set_num_threads(1)


class SayStepped(transformers.TrainerCallback):
    """Writes a byte after every step."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more
            os.write(self.pipe, b".")


def saved_step(bank: Path) -> int:
    """The step of the last checkpoint."""
    checkpoint = last_whole(bank / train_bank.CHECKPOINTS)
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def main() -> None:
    """Run the children one after the other."""
    settings, times = json.loads(sys.argv[1]), int(sys.argv[2])
    bank, draw = Path(settings["output"]), random.Random(0)
    killed = advanced = step = 0
    tasks: set[str] = set()
    for n in range(times):
        unfinished = (bank / train_bank.CHECKPOINTS / train_bank.SETTINGS).is_file()
        if not unfinished and bank.exists():
            settings["replace"], settings["basis"] = True, None
        chosen = {"output": str(bank), "resume": True} if unfinished else settings
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            try:
                train_bank.train_bank(BankSettings(**chosen), lambda line: None, [SayStepped(writes)])
            except LotrError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(3)
            os._exit(0)
        os.close(writes)
        if n % 3:  # two in three after some steps, the others wherever they are
            for _ in range(draw.randint(1, 6)):
                os.read(reads, 1)
        time.sleep(draw.uniform(0.0, 0.02 if n % 3 else 0.3))
        os.close(reads)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3:
            sys.exit("a child failed by itself")
        killed += os.WIFSIGNALED(status)
        if not (bank / "tasks.sqlite").exists():
            continue
        opened = CoreBank.open(bank)
        assert not opened.verify()["damaged"], "the bank is damaged"
        now = set(opened.names())
        assert tasks <= now, "a task that was saved is gone"
        tasks = now
        before, step = step, saved_step(bank)
        assert step >= before or not unfinished, "a checkpoint is gone"
        advanced += step > before
    print(json.dumps({"killed": killed, "advanced": advanced, "step": step, "tasks": sorted(tasks)}))


if __name__ == "__main__":
    main()
