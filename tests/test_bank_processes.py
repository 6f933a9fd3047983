"""Many processes at one bank: killed while they write, and reading while another writes."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

import bank_workers
import banks
from lotr import CoreBank, Task

KILLS = int(os.environ.get("LOTR_KILLS", "60"))


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["lotr"])  # imported once, not once a process
    return found


def received(told: Connection) -> list[tuple[str, list[str], list[str]]]:
    """Return all that a process said before it ended."""
    found = []
    try:
        while True:
            found.append(told.recv())
    except EOFError:
        return found


def test_what_returned_survives_kills_at_random_points(tmp_path: Path, context) -> None:
    banks.bank(tmp_path).close()
    folder, draw = tmp_path / "bank", random.Random(0)
    there: set[str] = set()
    cut_short = changed = 0
    for turn in range(1, KILLS + 1):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=bank_workers.changes, args=(folder, turn, theirs))
        process.start()
        theirs.close()
        assert mine.poll(60), "the process never began"
        said = [mine.recv() for _ in range(draw.randint(1, 12))]  # so it is at work, however busy the machine
        time.sleep(draw.random() * 0.01)
        process.kill()
        process.join()
        doubtful: set[str] = set()
        for what, gone, come in [*said, *received(mine)]:
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


def test_many_read_whole_tasks_while_one_writes(tmp_path: Path, context) -> None:
    bank = banks.bank(tmp_path)
    bank.add_many(Task(f"t{n}", torch.zeros(bank.layout.size), metadata={"turn": 0}) for n in range(5))
    bank.close()
    stop = context.Event()
    writer = context.Process(target=bank_workers.rewrites, args=(tmp_path / "bank", stop))
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    readers = [
        context.Process(target=bank_workers.reads, args=(tmp_path / "bank", theirs)) for _, theirs in pipes
    ]
    for process in (writer, *readers):
        process.start()
    found = [mine.recv() if mine.poll(60) else None for mine, _ in pipes]
    stop.set()
    for process in (writer, *readers):
        process.join(60)
        assert process.exitcode == 0
    assert all(each is not None and each[0] > 50 and each[1] > 3 for each in found), found


def test_writers_wait_for_each_other(tmp_path: Path, context) -> None:
    banks.bank(tmp_path).close()
    folder = tmp_path / "bank"
    processes = [context.Process(target=bank_workers.adds, args=(folder, turn)) for turn in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(CoreBank.open(folder)) == 3 * 20


def test_threads_share_a_bank(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=8)
    expected = {name: float(bank.get(name).numbers.sum()) for name in bank.names()}

    def reads(turn: int) -> bool:
        bank.add(Task(f"more-{turn}", torch.zeros(bank.layout.size)))
        return all(float(bank.get(name).numbers.sum()) == total for name, total in expected.items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads, range(64)))
    assert len(bank) == 8 + 64 and bank.verify()["ok"]


def test_a_forked_process_reads_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = banks.bank(tmp_path, tasks=3)
    monkeypatch.setattr(bank_workers, "inherited", bank, raising=False)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_inherited_sum, ["task-0", "task-1", "task-2", "task-0"])
    assert found == [float(bank.get(name).numbers.sum()) for name in ("task-0", "task-1", "task-2", "task-0")]


def _inherited_sum(name: str) -> float:
    return float(bank_workers.inherited.get(name).numbers.sum())  # type: ignore[attr-defined]
