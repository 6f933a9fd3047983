"""What is wrong on disk is said, and takes nothing else along."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import banks
from lotr import CheckpointError, ConfigError, CoreBank, LotrError
from lotr.bank.basis import TASKS
from lotr.bank.recover import recover
from lotr.files.adapter_folder import BANK, BASIS_WEIGHTS, CONFIG
from test_bank_processes import in_a_fork

N = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    banks.bank(tmp_path, tasks=N).close()
    return tmp_path / "bank"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A bank of 300 tasks of six kilobytes."""
    banks.bank(tmp_path, tasks=300, r=16).close()
    return tmp_path / "bank"


def change(folder: Path, sql: str, *values: object) -> list[tuple[object, ...]]:
    """Do something to the tasks behind the back of their checksums."""
    with closing(sqlite3.connect(folder / TASKS)) as connection, connection:
        return connection.execute(sql, values).fetchall()


def flip(folder: Path, name: str, column: str = "numbers", at: int = 7) -> None:
    """Change one byte of a task where it lies in the file."""
    ((blob,),) = change(folder, f"SELECT CAST({column} AS BLOB) FROM task WHERE name = ?", name)
    content = bytearray((folder / TASKS).read_bytes())
    assert content.count(blob) == 1
    content[content.index(blob) + at] ^= 16
    (folder / TASKS).write_bytes(content)


def pages(folder: Path) -> tuple[bytearray, int, list[int]]:
    """Return the content of the file, the size of a page, and the numbers of those that hold rows."""
    content = bytearray((folder / TASKS).read_bytes())
    size = int.from_bytes(content[16:18])
    size = 65536 if size == 1 else size
    return content, size, [n for n in range(4, len(content) // size) if content[n * size] == 13]


@pytest.mark.parametrize("column", ["numbers", "about", "checksum", "dtype"])
def test_a_flipped_byte_is_an_error_of_that_task_alone(folder: Path, column: str) -> None:
    if column == "dtype":  # as short as it is it occurs in every row
        change(folder, "UPDATE task SET dtype = 'bfloat16' WHERE name = 'task-7'")
    else:
        flip(folder, "task-7", column)
    bank = CoreBank.open(folder, writable=True)
    with pytest.raises(CheckpointError, match=r"Task 'task-7' in .* is damaged.*replace=True.*or remove it"):
        bank.get("task-7")
    others = [name for name in bank.names() if name != "task-7"]
    assert len(bank.read(others)[1]) == N - 1
    with pytest.raises(CheckpointError, match="'task-7'"):
        bank.rename("task-7", "whole")
    bank.add(banks.task(bank, "task-7", seed=7), replace=True)
    assert bank.get("task-7").metadata["seed"] == 7 and bank.verify()["ok"]


def test_verify_reports_every_damaged_task_and_the_others_are_listed(folder: Path) -> None:
    content = (folder / TASKS).read_bytes()
    assert content.count(b"task-33") == 2  # in the row and in the index
    (folder / TASKS).write_bytes(content.replace(b"task-33", b"task\xff33"))
    flip(folder, "task-3")
    numbers = dict(change(folder, "SELECT CAST(name AS BLOB), numbers FROM task"))
    for name, other in ((b"task-1", b"task-2"), (b"task-2", b"task-1")):  # each has the other's
        change(folder, "UPDATE task SET numbers = ? WHERE name = ?", numbers[other], name.decode())
    bank, ticks = CoreBank.open(folder), list[tuple[int, int]]()
    report = bank.verify(lambda done, of: ticks.append((done, of)))
    assert sorted(found["task"] for found in report["damaged"]) == ["task-1", "task-2", "task-3", "task�33"]
    assert (report["tasks"], report["ok"]) == (N, False)
    assert ticks == [(n, N) for n in range(1, N + 1)]
    assert len(list(bank.names())) == N and "task-32" in bank


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_database_says_so_and_what_is_left_is_recovered(
    large: Path, tmp_path: Path, share: float
) -> None:
    file = large / TASKS
    os.truncate(file, int(file.stat().st_size * share))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"tasks.sqlite is damaged: it was cut off.*lotr bank recover"):
        CoreBank.open(large)
    report = recover(large, tmp_path / "new")
    assert share - 0.15 < report["saved"] / 300 < share + 0.05
    assert file.read_bytes() == before
    saved = CoreBank.open(tmp_path / "new")
    assert saved.verify()["ok"] and len(saved) == report["saved"]
    for name in saved.names():
        task = saved.get(name)
        assert torch.equal(task.numbers, banks.task(saved, name, seed=task.metadata["seed"]).numbers)
    assert report["lost"] is None or len(report["lost"]) == 300 - report["saved"]


def test_a_page_of_garbage_costs_its_own_tasks_alone(large: Path, tmp_path: Path) -> None:
    content, size, leaves = pages(large)
    at = leaves[len(leaves) // 2] * size
    content[at : at + size] = b"\x63" + os.urandom(size - 1)  # no kind of page
    (large / TASKS).write_bytes(content)
    report = CoreBank.open(large).verify()
    assert not report["ok"] and report["files"] and 0 < len(report["damaged"]) < 40
    saved = recover(large, tmp_path / "new")["saved"]
    assert saved == 300 - len(report["damaged"]) == len(CoreBank.open(tmp_path / "new"))


def test_whatever_byte_changes_no_wrong_number_is_ever_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotr.bank.task.time.time", lambda: 1.8e9)  # the same file in every run
    folder = tmp_path / "bank"
    with CoreBank.create(folder, banks.basis(tmp_path / "basis"), dtype="float32") as bank:
        bank.add_many(banks.task(bank, f"task-{n}", seed=n) for n in range(20))
        right = {name: bank.get(name).numbers for name in bank.names()}
    whole = (folder / TASKS).read_bytes()
    draw = random.Random(0)
    used = [n for n, byte in enumerate(whole) if byte]  # most of a small file is empty
    refused = 0
    for _ in range(100):
        content = bytearray(whole)
        content[draw.choice(used)] ^= 1 << draw.randrange(8)
        (folder / TASKS).write_bytes(content)
        try:
            with CoreBank.open(folder) as bank:
                report = bank.verify()
                for name, numbers in right.items():
                    try:
                        assert torch.equal(bank.get(name).numbers, numbers)
                    except LotrError:
                        refused += 1
                        assert not report["ok"]
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_opening_and_listing_read_no_task(large: Path) -> None:
    content, size, leaves = pages(large)
    for n in leaves:  # all rows of tasks are gone
        content[n * size : (n + 1) * size] = bytes(size)
    (large / TASKS).write_bytes(content)
    bank = CoreBank.open(large)
    assert len(leaves) > 20 and len(bank) == len(list(bank.names())) == 300 and "task-299" in bank
    with pytest.raises(CheckpointError, match="Task 'task-299' cannot be read"):
        bank.get("task-299")


def test_what_is_no_bank_and_no_database_is_named(folder: Path, tmp_path: Path) -> None:
    def refuses(path: Path, says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            CoreBank.open(path)

    refuses(tmp_path / "gone", r"gone does not exist. `lotr bank create` makes one")
    refuses(tmp_path / "basis", r"holds no bank.json, so it is not a bank")
    (folder / TASKS).write_bytes(b"not a database at all" * 1000)
    refuses(folder, r"tasks.sqlite is no database")
    (folder / TASKS).unlink()
    refuses(folder, r"holds no tasks.sqlite")
    assert not (folder / TASKS).exists()


def test_a_basis_with_other_numbers_is_refused_and_tasks_stay_readable(folder: Path) -> None:
    tensors = load_file(folder / BASIS_WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, folder / BASIS_WEIGHTS, metadata={"format": "pt"})
    bank = CoreBank.open(folder)
    with pytest.raises(CheckpointError, match=r"factors in basis=.*hash \w{16}, not \w{16}"):
        bank.basis.factors()
    with pytest.raises(CheckpointError, match="hash"):
        bank.export("task-0", folder.parent / "out")
    assert not (folder.parent / "out").exists()
    report = bank.verify()
    assert "hash" in report["files"][0] and not report["damaged"] and not report["ok"]


def test_files_of_different_banks_are_told_apart(folder: Path, tmp_path: Path) -> None:
    for file, fields, says in (
        (TASKS, {"seed": 9}, "belong to a basis with hash"),
        (BANK, {"seed": 9}, "the checksum of bank.json, adapter_config.json differs"),
        (CONFIG, {"r": 2}, "the checksum of bank.json, adapter_config.json differs"),
    ):
        torch.manual_seed(9)
        (tmp_path / f"other-{file}").mkdir()
        banks.bank(tmp_path / f"other-{file}", **fields).close()
        mixed = shutil.copytree(folder, tmp_path / f"mixed-{file}")
        shutil.copyfile(tmp_path / f"other-{file}" / "bank" / file, mixed / file)
        with pytest.raises(CheckpointError, match=says) as refusal:
            CoreBank.open(mixed)
        assert "put together from different" in str(refusal.value)


def test_a_description_that_does_not_fit_is_refused(folder: Path) -> None:
    description = json.loads((folder / BANK).read_text())
    del description["checksum"]
    for fields, says in (
        ({"format": 1}, "has format 1, and this version of lotr reads format 2 alone"),
        ({"format": 3, "unheard": "of"}, "has format 3"),
        ({"unheard": "of"}, "bank.json is damaged: .*unheard"),
        ({"dtype": "int4"}, "bank.json is damaged: dtype='int4'"),
    ):
        (folder / BANK).write_text(json.dumps(description | fields))
        with pytest.raises(CheckpointError, match=says):
            CoreBank.open(folder)


@pytest.mark.parametrize("name", [BANK, CONFIG])
def test_one_changed_digit_in_a_bank_s_description_is_refused(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    for digit in re.finditer(r"\d", text):
        other = str((int(digit[0]) + 1) % 10)
        (folder / name).write_text(text[: digit.start()] + other + text[digit.end() :])
        with pytest.raises(CheckpointError, match=r"checksum|damaged|has format|saved in format"):
            CoreBank.open(folder)


def test_a_full_disk_loses_nothing(folder: Path) -> None:
    bank = CoreBank.open(folder, writable=True)
    with bank.store.database.connected() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(
        CheckpointError, match=r"the disk is full. Nothing was written and nothing lost; make room"
    ):
        bank.add_many(banks.task(bank, f"new-{n}") for n in range(1000))
    assert len(bank) == N and bank.verify()["ok"]
    bank.add(banks.task(bank, "small enough"))
    assert len(CoreBank.open(folder)) == N + 1


def test_a_folder_that_may_not_be_written_is_read(folder: Path) -> None:
    def read(tell: Callable[[Any], None]) -> None:
        """Read, verify and try to write as a user without rights, because a superuser has them all."""
        if os.geteuid() == 0:
            os.setuid(65534)
        bank = CoreBank.open(locked)
        tell((len(bank), bank.get("task-0").metadata["seed"], bank.verify()["ok"]))
        try:
            CoreBank.open(locked, writable=True).remove("task-0")
            tell("removed")
        except CheckpointError as error:
            tell(str(error))

    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        locked = shutil.copytree(folder, Path(place) / "bank")
        for file in locked.iterdir():
            file.chmod(0o444)
        locked.chmod(0o555)
        _, told = in_a_fork(read)
        assert told.recv() == (N, 0, True) and "may not be" in told.recv()
        assert sorted(p.name for p in locked.iterdir()) == sorted([BANK, CONFIG, BASIS_WEIGHTS, TASKS])
        locked.chmod(0o755)


def test_recovering_needs_a_free_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        recover(folder, tmp_path / "basis")
    assert recover(folder, tmp_path / "copy") == {"saved": N, "lost": [], "output": str(tmp_path / "copy")}
