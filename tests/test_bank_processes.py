"""Many processes at one bank: killed while they write, and reading while another writes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


def test_what_returned_survives_kills_at_random_points(folder: Path) -> None:
    def change(turn: int, tell: Callable[[Any], None]) -> None:
        """Add, rename, remove and replace tasks until killed; tell of every round that has returned."""
        bank = CoreBank.open(folder, writable=True)
        for n in itertools.count():
            bank.add_many(task(bank, f"{turn}.{n}{end}", turn) for end in "abc")
            bank.rename(f"{turn}.{n}a", f"{turn}.{n}")
            bank.remove(f"{turn}.{n}b")
            bank.add(task(bank, f"{turn}.{n}c", -turn), replace=True)
            tell(n)

    draw, there, states = random.Random(0), set[str](), Counter[str]()
    for turn in range(1, KILLS + 1):
        process, told = in_a_fork(partial(change, turn))
        assert told.poll(60), "the process never began"
        time.sleep(draw.random() * 0.02)
        process.kill()
        process.join()
        rounds = 0
        with suppress(EOFError):
            while told.recv() == rounds:
                rounds += 1
        there |= {f"{turn}.{n}{end}" for n in range(rounds) for end in ("", "c")}
        with CoreBank.open(folder) as bank:
            names = set(bank.names())
            assert there <= names
            state = ", ".join(sorted(name.removeprefix(f"{turn}.{rounds}") for name in names - there))
            assert state in ("", "a, b, c", ", b, c", ", c")  # of the round in which it was killed
            there, states = names, states + Counter([state])
            if turn % 20 == 0:
                report = bank.verify()
                assert report["ok"] and report["tasks"] == len(there), report
    assert len(states) > 2 and len(there) > 2 * KILLS  # it was at work, and was killed at work


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


def test_a_reader_that_may_not_write_sees_what_others_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CoreBank.open(folder, writable=True) as bank:
        bank.add(task(bank, "first", 1))
    with monkeypatch.context() as of_another_user:
        of_another_user.setattr(os, "access", lambda path, mode: False)
        reader = CoreBank.open(folder)
        assert list(reader.names()) == ["first"] and reader.store.database._mode() == "ro&immutable=1"
        before = reader.store.database.version
        with CoreBank.open(folder, writable=True) as bank:
            bank.add_many(task(bank, f"t{n}", n) for n in range(200))
            bank.remove("first")
        assert reader.store.database.version != before
        assert "first" not in reader and len(list(reader.names())) == 200
        assert float(reader.get("t7").numbers[0]) == 7
        reader.close()


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
