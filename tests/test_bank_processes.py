"""Many processes at one bank: killed while they write, and reading while another writes."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import banks
from lotr import CoreBank, Task

KILLS = int(os.environ.get("LOTR_KILLS", "60"))
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    banks.bank(tmp_path).close()
    return tmp_path / "bank"


def in_a_fork(run: Callable[[Any], Any]) -> tuple[Any, Connection]:
    """Start a process with a function that tells; return it and the end of the pipe at which it is heard."""
    mine, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=run, args=(theirs.send,))
    process.start()
    theirs.close()
    return process, mine


def task(bank: CoreBank, name: str, turn: int) -> Task:
    """A task whose numbers and metadata say the same."""
    return Task(name, torch.full((bank.layout.size,), float(turn)), metadata={"turn": turn})


def change(folder: Path, turn: int, tell: Callable[[Any], None]) -> None:
    """Add, rename and remove tasks until killed; tell of every change before it begins and after it returned.

    A change is what it takes away and what it brings.
    """
    bank = CoreBank.open(folder, writable=True)
    for n in range(10**6):
        one, two, three = several = [f"{turn}-{n}", f"{turn}-{n}-b", f"{turn}-{n}-c"]
        steps: list[tuple[Any, list[str], list[str]]] = [
            (partial(bank.add, task(bank, one, turn)), [], [one]),
            (partial(bank.rename, one, f"{one}-a"), [one], [f"{one}-a"]),
            (partial(bank.add_many, [task(bank, each, turn) for each in several]), [], several),
            (partial(bank.remove, one, two), [one, two], []),
            (partial(bank.add, task(bank, three, -turn), replace=True), [], []),
        ]
        for step, gone, come in steps:
            tell(("begins", gone, come))
            step()
            tell(("returned", gone, come))


def all_of(told: Connection) -> list[tuple[str, list[str], list[str]]]:
    """Return all that a process said before it ended."""
    heard = []
    try:
        while True:
            heard.append(told.recv())
    except EOFError:
        return heard


def test_what_returned_survives_kills_at_random_points(folder: Path) -> None:
    draw = random.Random(0)
    there: set[str] = set()
    cut_short = changed = 0
    for turn in range(1, KILLS + 1):
        process, told = in_a_fork(lambda tell, turn=turn: change(folder, turn, tell))
        assert told.poll(60), "the process never began"
        heard = [
            told.recv() for _ in range(draw.randint(1, 12))
        ]  # so it is at work, however busy the machine
        time.sleep(draw.random() * 0.01)
        process.kill()
        process.join()
        doubtful: set[str] = set()
        for what, gone, come in [*heard, *all_of(told)]:
            doubtful = {*gone, *come} if what == "begins" else set()
            if what == "returned":
                there, changed = (there - {*gone}) | {*come}, changed + 1
        with CoreBank.open(folder) as bank:
            found = set(bank.names())
            assert found - doubtful == there - doubtful
            there, cut_short = found, cut_short + bool(doubtful)
            if turn % 20 == 0:
                report = bank.verify()
                assert report["ok"] and report["tasks"] == len(there), report
    assert min(changed, cut_short) > KILLS / 4  # it was at work, and was killed at work


def test_many_read_whole_tasks_while_one_writes(folder: Path) -> None:
    def write(tell: Callable[[Any], None]) -> None:
        """Replace all tasks at once, over and over."""
        with CoreBank.open(folder, writable=True) as bank:
            for turn in range(10**6):
                bank.add_many((task(bank, f"t{n}", turn) for n in range(5)), replace=True)
                if turn == 0:
                    tell("begun")

    def read(tell: Callable[[Any], None]) -> None:
        """Read until the tasks were seen in several states, or for a while; tell how many of both."""
        seen, states, until = 0, set(), time.monotonic() + 20
        with CoreBank.open(folder) as bank:
            while time.monotonic() < until and (seen <= 50 or len(states) <= 5):
                for one in bank.read(list(bank.names()))[1]:
                    assert (one.numbers == one.metadata["turn"]).all()
                    seen, states = seen + 1, states | {one.metadata["turn"]}
        tell((seen, len(states)))

    writer, begun = in_a_fork(write)
    assert begun.recv() == "begun"
    heard = [told.recv() for _, told in [in_a_fork(read) for _ in range(3)]]
    writer.kill()
    writer.join()
    assert all(seen > 50 and states > 3 for seen, states in heard), heard


def test_writers_wait_for_each_other(folder: Path) -> None:
    def add(turn: int) -> None:
        with CoreBank.open(folder, writable=True) as bank:
            for n in range(20):
                bank.add(task(bank, f"{turn}-{n}", turn))

    processes = [in_a_fork(lambda _, turn=turn: add(turn))[0] for turn in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(CoreBank.open(folder)) == 3 * 20


def test_threads_share_a_bank_and_forks_read_on_their_own(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=8)
    expected = {name: float(bank.get(name).numbers.sum()) for name in bank.names()}

    def sums() -> dict[str, float]:
        return {name: float(bank.get(name).numbers.sum()) for name in expected}

    def reads(turn: int) -> bool:
        bank.add(Task(f"more-{turn}", torch.zeros(bank.layout.size)))
        return sums() == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads, range(64)))
    assert len(bank) == 8 + 64 and bank.verify()["ok"]
    assert all(
        told.recv() == expected for _, told in [in_a_fork(lambda tell: tell(sums())) for _ in range(2)]
    )
