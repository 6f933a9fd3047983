"""Kills commands at their file operations and lets them go on; `python tests/kill.py 200 [seed]` tells what came of it.

Every command runs in a fork of this process, which has imported all that it needs. `kill.c` counts the operations below
the output (open to write, write, sync, rename, remove, …, those of SQLite and of Rust too) and kills the process before
one, halfway through it, or behind it; in a third of the cases the one that goes on is killed as well. Then it goes on
as a user would let it: with `--resume` where the command has that, else, or where that is refused, by the same words
again. In the end every file has to be as an uninterrupted run leaves it, and no other may be there.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import banks
import commands
import lotr.compression.run
import lotr.training.run
import lotr.training.tasks.run  # noqa: F401  (everything is imported once, before processes are made)
import saved_models
from fuzz import plain
from loras import lora
from lotr import CoreBank, LotrConfig
from lotr.bank.basis import TASKS
from lotr.compression import passes

MOMENTS = ("before", "halfway", "behind")
#: Fields in which two runs to the same numbers differ.
TIMES = ("seconds", "runtime", "per_second", "peak_memory_bytes", "resumed_at")


@dataclass(frozen=True)
class Command:
    """A command, what it goes on with where that is something else, and the bank that it changes."""

    words: tuple[object, ...]
    resume: tuple[object, ...] | None = None
    bank: Path | None = None


def make(home: Path, out: Path) -> dict[str, Command]:
    """Make a model, data, adapters and a bank, and the commands that use them and write below `out`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bert = saved_models.save_bert(home / "bert")
    model = partial(AutoModelForSequenceClassification.from_pretrained, bert, num_labels=3)
    adapted = LotrConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(model(), adapted).save_pretrained(home / "basis")
    with CoreBank.create(home / "bank", home / "basis") as bank:
        for n, name in enumerate(("one", "two", "three", "four")):
            saved_models.write_colours(home / f"{name}.csv", rows=24, seed=n)
            bank.add(banks.task(bank, name, seed=n))
            bank.export(name, home / name)
        bank.remove("three", "four")
    for n in range(3):
        lora(home / "loras" / f"lora-{n}", n, model, bert, task_type="SEQ_CLS")
    (home / "tasks.yaml").write_text("one: one.csv\ntwo: two.csv\n")
    few = ("--max-steps", 6, "--batch-size", 4)
    train, tasks = ("train", "--output", out / "run"), ("bank", "train", "--output", out / "bank")
    of_train = ("--model", bert, "--train", home / "one.csv", "--rank", 2, "--eval-steps", 2, *few)
    of_tasks = ("--basis", home / "basis", "--tasks", home / "tasks.yaml", "--save-steps", 2, *few)
    added = ("bank", "add", out / "bank", home / "three", home / "four")
    fit = ("compress", home / "loras" / "*", "--output", out / "bank", "--rank", 2)
    return {
        "lotr train": Command((*train, *of_train), (*train, "--resume")),
        "lotr bank train": Command((*tasks, *of_tasks), (*tasks, "--resume")),
        "lotr bank add": Command(added, bank=home / "bank"),
        "lotr compress": Command(fit),
    }


def forked(shim: Any, out: Path, words: tuple[object, ...], operation: int = 0, moment: int = 0) -> Any:
    """Run a command in a fork; return its code, its message and its operations, or nothing where it was killed."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # torch makes its pool anew in a fork, and not from two threads at once
        shim.kill_at(os.fsencode(out), operation, moment)
        result = commands.lotr(*map(str, words))
        told = json.dumps((result.exit_code, result.stderr or repr(result.exception), shim.operations()))
        os.write(writes, told.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else None


def content(folder: Path) -> dict[str, Any]:
    """Return what lies in a folder: bytes of files, tasks of banks, JSON without times."""
    left: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == TASKS:
            with CoreBank.open(path.parent) as bank:
                left[name] = [bank.verify()["ok"], *(plain(vars(bank.get(task))) for task in bank.names())]
        elif path.suffix == ".json":
            left[name] = _timeless(json.loads(path.read_text()))
        else:
            left[name] = path.read_bytes() if path.is_file() else "folder"
    return left


def _timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_timeless(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {key: _timeless(inner) for key, inner in value.items() if not key.endswith(TIMES)}


def run(times: int, seed: int = 0) -> tuple[dict[str, Counter[str]], list[str]]:
    """Kill commands so many times in all; return what was counted of each, and what is wrong."""
    shim, draw, wrong = ctypes.CDLL(os.environ["LD_PRELOAD"]), random.Random(seed), list[str]()
    passes.SAVE_AFTER = 0.0  # a fit of a second is kept as one of hours
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home, out = Path(temporary) / "home", Path(temporary) / "out"
        for name, command in make(home, out).items():
            counted = counts[name] = Counter()

            def begin(command: Command = command) -> None:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                if command.bank is not None:
                    shutil.copytree(command.bank, out / "bank")

            begin()
            code, message, operations = forked(shim, out, command.words)
            assert code == 0, message
            right, share = content(out), times // 4
            counted["operations"] = operations
            for n in range(share):
                begin()
                at, moment = 1 + int((n + draw.random()) * operations / share), n % 3
                place = f"{name}, {MOMENTS[moment]} operation {at}"
                if forked(shim, out, command.words, at, moment) is not None:
                    wrong.append(f"{place}: was not reached")
                    continue
                counted[f"killed {MOMENTS[moment]}"] += 1
                if n % 3 == draw.randrange(3):
                    at = draw.randrange(1, operations + 1)
                    again = command.resume or command.words
                    if forked(shim, out, again, at, moment) is None:
                        counted["killed again"] += 1
                        place += f", and again at {at}"
                outcome, messages = "resumed", []
                if command.resume is None or (ended := forked(shim, out, command.resume))[0]:
                    if command.resume is not None:
                        messages.append(ended[1])
                    outcome, ended = "run again", forked(shim, out, command.words)
                    if ended[0]:
                        messages.append(ended[1])
                        outcome = "was finished"
                counted[outcome] += 1
                left = content(out)
                odd = [key for key in {**right, **left} if key not in left or left[key] != right.get(key)]
                if odd:
                    wrong.append(f"{place}: {outcome}, but differs in {odd}; {messages}")
    return counts, wrong


def main() -> None:
    """Print the table, in a process that `kill.c` is loaded into."""
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            shim = Path(folder) / "kill.so"
            source = Path(__file__).with_suffix(".c")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
            loaded = {**os.environ, "LD_PRELOAD": str(shim), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=loaded).returncode)
    counts, wrong = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for name, counted in counts.items():
        print(f"{name:16}", *(f"{what}: {count}" for what, count in counted.items()), sep="  ")
    print(
        sum(count for counted in counts.values() for what, count in counted.items() if "killed" in what),
        "kills",
    )
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
