"""What other processes do to a bank; imports little, because every process imports it."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lotr import CoreBank, Task


def _task(bank: CoreBank, name: str, turn: int) -> Task:
    """A task whose numbers and metadata say the same."""
    return Task(name, torch.full((bank.layout.size,), float(turn)), metadata={"turn": turn})


def changes(folder: Path, turn: int, told: Connection) -> None:
    """Add, rename and remove tasks until killed; tell of every change before it begins and after it returned.

    A change is what it takes away and what it brings.
    """
    torch.set_num_threads(1)
    bank = CoreBank.open(folder, writable=True)
    for n in range(10**6):
        name = f"{turn}-{n}"
        several = [name, f"{name}-b", f"{name}-c"]
        steps: list[tuple[Any, list[str], list[str]]] = [
            (lambda name=name: bank.add(_task(bank, name, turn)), [], [name]),
            (lambda name=name: bank.rename(name, f"{name}-a"), [name], [f"{name}-a"]),
            (lambda s=several: bank.add_many(_task(bank, each, turn) for each in s), [], several),
            (lambda s=several: bank.remove(*s[:2]), several[:2], []),
            (lambda s=several: bank.add(_task(bank, s[2], -turn), replace=True), [], []),
        ]
        for change, gone, come in steps:
            told.send(("begins", gone, come))
            change()
            told.send(("returned", gone, come))


def rewrites(folder: Path, stop: Any) -> None:
    """Replace all tasks at once, over and over."""
    torch.set_num_threads(1)
    bank, turn = CoreBank.open(folder, writable=True), 0
    while not stop.is_set():
        turn += 1
        bank.add_many((_task(bank, f"t{n}", turn) for n in range(5)), replace=True)


def reads(folder: Path, told: Connection) -> None:
    """Read until the tasks were seen in several states, or for a while; tell how many were seen, and in how many."""
    torch.set_num_threads(1)
    bank, seen, states = CoreBank.open(folder), 0, set()
    until = time.monotonic() + 20
    while time.monotonic() < until and (seen <= 50 or len(states) <= 5):
        for task in bank.read(list(bank.names()))[1]:
            assert (task.numbers == task.metadata["turn"]).all()
            seen, states = seen + 1, states | {task.metadata["turn"]}
    told.send((seen, len(states)))


def adds(folder: Path, turn: int) -> None:
    """Add twenty tasks, each in a transaction of its own."""
    torch.set_num_threads(1)
    with CoreBank.open(folder, writable=True) as bank:
        for n in range(20):
            bank.add(_task(bank, f"{turn}-{n}", turn))
