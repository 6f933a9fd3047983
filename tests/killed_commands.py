"""Kills commands at their file operations and lets them go on. Run by `test_kill.py`, which loads `kill.c` into it.

Every command runs in a fork of this process, which has imported all that it needs. `kill.c` counts the operations below
the output (open to write, write, sync, rename, remove, …, those of SQLite and of Rust too) and kills the process before
one, halfway through it, or behind it; in a third of the cases the one that goes on is to be killed too, if it gets that
far. Then it goes on as a user would let it: with `--resume` where the command has that, else, or where that is refused,
by the same words again. In the end every file has to be as an uninterrupted run leaves it, and no other may be there.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import banks
import lotr.compression.run
import lotr.training.run
import lotr.training.tasks.run  # noqa: F401  (everything is imported once, before processes are made)
import saved_models
from commands import lotr as lotr_command
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
    """Run a command in a fork; return code, message, operations and imports, or nothing where it was killed."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # torch makes its pool anew in a fork, and not from two threads at once
        shim.kill_at(os.fsencode(out), operation, moment)
        before = set(sys.modules)
        result = lotr_command(*map(str, words))
        told = result.exit_code, result.stderr or repr(result.exception), shim.operations()
        os.write(writes, json.dumps((*told, sorted(set(sys.modules) - before))).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


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


def go_on(shim: Any, out: Path, command: Command) -> tuple[str, list[str]]:
    """Bring a killed command to its end; return how, and what was said on the way."""
    said: list[str] = []
    if command.resume is not None:
        code, message, *_ = forked(shim, out, command.resume)
        if code == 0:
            return "went on", said
        said.append(message)
    code, message, *_ = forked(shim, out, command.words)
    return ("begun again" if code == 0 else "was finished"), [*said, message]


def run(name: str, command: Command, out: Path, kills: int, draw: random.Random) -> int:
    """Kill a command so many times, and print what was counted and what is wrong; return how much is."""
    shim, wrong, counted = ctypes.CDLL(os.environ["LD_PRELOAD"]), list[str](), Counter[str]()

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if command.bank is not None:
            shutil.copytree(command.bank, out / "bank")

    begin()
    code, message, operations, imports = forked(shim, out, command.words)
    assert code == 0, message
    for module in imports:  # here, so that those to come need not
        with suppress(ImportError):
            importlib.import_module(module)
    right = content(out)
    for n in range(kills):
        begin()
        at, moment = 1 + int((n + draw.random()) * operations / kills), n % 3
        place = f"{MOMENTS[moment]} operation {at}"
        killed = forked(shim, out, command.words, at, moment) is None
        counted[f"killed {MOMENTS[moment]}"] += killed
        if draw.random() < 1 / 3:
            at = draw.randrange(1, operations)
            if forked(shim, out, command.resume or command.words, at, moment) is None:
                counted["killed again"] += 1
                place += f", and again {at}"
        how, said = go_on(shim, out, command)
        counted[how] += 1
        left = content(out)
        odd = [key for key in {**right, **left} if key not in left or left[key] != right.get(key)]
        if odd or not killed:
            wrong.append(f"  {place}: {how if killed else 'was not reached'}; differs in {odd}; {said}")
    told = (f"{what}: {count}" for what, count in counted.items())
    print(f"{name}, {operations} operations", *told, *wrong, sep="\n  ", flush=True)
    return len(wrong)


def main() -> None:
    """Run all commands."""
    times, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    passes.SAVE_AFTER = 0.0  # a fit of a second is kept as one of hours
    with tempfile.TemporaryDirectory() as temporary:
        commands = make(Path(temporary) / "home", out := Path(temporary) / "out")
        wrong = [run(*one, out, times // len(commands), random.Random(seed)) for one in commands.items()]
    sys.exit(bool(sum(wrong)))


if __name__ == "__main__":
    main()
