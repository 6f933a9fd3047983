"""What is wrong on disk is said, and takes nothing else along."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import banks
from lotr import CheckpointError, ConfigError, CoreBank, LotrError, Task
from lotr.bank.basis import BANK, TASKS
from lotr.bank.recover import recover
from lotr.bank.store import TaskStore, create_store
from lotr.files.adapter_folder import BASIS_WEIGHTS, CONFIG

N = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    banks.bank(tmp_path, tasks=N).close()
    return tmp_path / "bank"


def flip(folder: Path, name: str, column: str = "numbers", at: int = 7) -> None:
    """Change one byte of a task where it lies in the file."""
    sql = f"SELECT CAST({column} AS BLOB) FROM task WHERE name = ?"
    connection = sqlite3.connect(folder / TASKS)
    blob = connection.execute(sql, (name,)).fetchone()[0]
    connection.close()
    content = bytearray((folder / TASKS).read_bytes())
    assert content.count(blob) == 1
    content[content.index(blob) + at] ^= 16
    (folder / TASKS).write_bytes(content)


@pytest.mark.parametrize("column", ["numbers", "about", "checksum", "dtype"])
def test_a_flipped_byte_is_an_error_of_that_task_alone(folder: Path, column: str) -> None:
    connection = sqlite3.connect(folder / TASKS)
    if column == "dtype":  # as short as it is it occurs in every row
        connection.execute("UPDATE task SET dtype = 'bfloat16' WHERE name = 'task-7'")
        connection.commit()
    connection.close()
    if column != "dtype":
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


def test_a_changed_name_is_found_and_the_others_are_listed(folder: Path) -> None:
    content = (folder / TASKS).read_bytes()
    assert content.count(b"task-33") == 2  # in the row and in the index
    (folder / TASKS).write_bytes(content.replace(b"task-33", b"task\xff33"))
    bank = CoreBank.open(folder)
    assert len(list(bank.names())) == N and "task-32" in bank
    report = bank.verify()
    assert [found["task"] for found in report["damaged"]] == ["task�33"] and not report["ok"]


def test_verify_reports_every_damaged_task(folder: Path) -> None:
    for name in ("task-3", "task-14", "task-59"):
        flip(folder, name)
    ticks: list[tuple[int, int]] = []
    report = CoreBank.open(folder).verify(lambda done, of: ticks.append((done, of)))
    assert sorted(found["task"] for found in report["damaged"]) == ["task-14", "task-3", "task-59"]
    assert all("checksum" in found["reason"] for found in report["damaged"])
    assert (report["tasks"], report["ok"], report["file"]) == (N, False, [])
    assert ticks == [(n, N) for n in range(1, N + 1)]


def test_two_tasks_whose_numbers_were_swapped_are_both_damaged(folder: Path) -> None:
    connection = sqlite3.connect(folder / TASKS)
    old = dict(connection.execute("SELECT name, numbers FROM task WHERE name IN ('task-1', 'task-2')"))
    connection.execute("UPDATE task SET numbers = ? WHERE name = 'task-1'", (old["task-2"],))
    connection.execute("UPDATE task SET numbers = ? WHERE name = 'task-2'", (old["task-1"],))
    connection.commit()
    connection.close()
    assert sorted(found["task"] for found in CoreBank.open(folder).verify()["damaged"]) == [
        "task-1",
        "task-2",
    ]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_database_says_so_and_what_is_left_is_recovered(tmp_path: Path, share: float) -> None:
    bank = banks.bank(tmp_path, r=16)  # rows of six kilobytes
    bank.add_many(banks.task(bank, f"task-{n}", seed=n) for n in range(300))
    bank.close()
    file = tmp_path / "bank" / TASKS
    os.truncate(file, int(file.stat().st_size * share))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"tasks.sqlite is damaged: it was cut off.*lotr bank recover"):
        CoreBank.open(tmp_path / "bank")
    report = recover(tmp_path / "bank", tmp_path / "new")
    assert share - 0.15 < report["saved"] / 300 < share + 0.05
    assert file.read_bytes() == before
    saved = CoreBank.open(tmp_path / "new")
    assert saved.verify()["ok"] and len(saved) == report["saved"]
    for name in saved.names():
        task = saved.get(name)
        assert torch.equal(task.numbers, banks.task(saved, name, seed=task.metadata["seed"]).numbers)
    if report["lost"] is not None:
        assert len(report["lost"]) == 300 - report["saved"]


def test_a_page_of_garbage_costs_its_own_tasks_alone(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, r=16)
    bank.add_many(banks.task(bank, f"task-{n}", seed=n) for n in range(300))
    page = bank.store._rows("PRAGMA page_size")[0][0]
    bank.close()
    file = tmp_path / "bank" / TASKS
    content = bytearray(file.read_bytes())
    at = next(n for n in range(len(content) // page // 2, len(content) // page) if content[n * page] == 13)
    content[at * page : (at + 1) * page] = os.urandom(page)
    content[at * page] = 99  # no kind of page
    file.write_bytes(content)
    report = CoreBank.open(tmp_path / "bank").verify()
    assert not report["ok"] and report["file"] and 0 < len(report["damaged"]) < 40
    left = 300 - len(report["damaged"])
    assert (
        recover(tmp_path / "bank", tmp_path / "new")["saved"] == left == len(CoreBank.open(tmp_path / "new"))
    )


def test_whatever_byte_changes_no_wrong_number_is_ever_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotr.bank.task.time.time", lambda: 1.8e9)  # the same file in every run
    banks.bank(tmp_path, tasks=N).close()
    folder = tmp_path / "bank"
    whole = (folder / TASKS).read_bytes()
    bank = CoreBank.open(folder)
    right = {name: bank.get(name).numbers for name in bank.names()}
    bank.close()
    draw = random.Random(0)
    used = [n for n, byte in enumerate(whole) if byte]  # most of a small file is empty
    refused = 0
    for _ in range(200):
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
    assert refused > 100


def test_opening_and_listing_read_no_task(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, r=16)
    bank.add_many(banks.task(bank, f"task-{n}", seed=n) for n in range(300))
    page = bank.store._rows("PRAGMA page_size")[0][0]
    bank.close()
    file = tmp_path / "bank" / TASKS
    content = bytearray(file.read_bytes())
    leaves = [n for n in range(4, len(content) // page) if content[n * page] == 13]
    for n in leaves:  # all rows of tasks are gone
        content[n * page : (n + 1) * page] = bytes(page)
    file.write_bytes(content)
    bank = CoreBank.open(tmp_path / "bank")
    assert len(leaves) > 20 and len(bank) == len(list(bank.names())) == 300 and "task-299" in bank
    with pytest.raises(CheckpointError, match="Task 'task-299' cannot be read"):
        bank.get("task-299")


def test_what_is_no_database_is_named(folder: Path) -> None:
    (folder / TASKS).write_bytes(b"not a database at all" * 1000)
    with pytest.raises(CheckpointError, match=r"tasks.sqlite is no database"):
        CoreBank.open(folder)
    (folder / TASKS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no tasks.sqlite"):
        CoreBank.open(folder)
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
    assert "hash" in report["basis"] and not report["damaged"] and not report["ok"]


def test_files_of_different_banks_are_told_apart(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    (tmp_path / "second").mkdir()
    other = banks.bank(tmp_path / "second", seed=9, tasks=1)
    other.close()
    (tmp_path / "third").mkdir()
    third = banks.bank(tmp_path / "third", r=2)
    third.close()
    for file, source, says in (
        (TASKS, other, "belong to a basis with hash"),
        (BANK, other, "belong to a basis with hash"),
        (CONFIG, third, "96 numbers a task, and adapter_config.json beside it of 24"),
    ):
        mixed = tmp_path / f"mixed-{file}"
        shutil.copytree(folder, mixed)
        shutil.copyfile(source.path / file, mixed / file)
        with pytest.raises(CheckpointError, match=f"{says}.*put together from different banks"):
            CoreBank.open(mixed)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"format": 1}, "has format 1, and this version of lotr reads format 2 alone"),
        ({"format": 3, "unheard": "of"}, "has format 3"),
        ({"unheard": "of"}, "bank.json is damaged: .*unheard"),
        ({"basis_hash": "0" * 16}, "belong to a basis with hash"),
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(folder: Path, change: dict, says: str) -> None:
    said = json.loads((folder / BANK).read_text())
    (folder / BANK).write_text(json.dumps(said | change))
    with pytest.raises(CheckpointError, match=says):
        CoreBank.open(folder)
    (folder / BANK).write_text(json.dumps(said))
    assert len(CoreBank.open(folder)) == N


def test_what_is_no_bank_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone does not exist. `lotr bank create` makes one"):
        CoreBank.open(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no bank.json, so it is not a bank"):
        CoreBank.open(banks.basis(tmp_path / "basis"))


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


def _reads_without_rights(folder: Path, told: Connection) -> None:
    """Read, verify and try to write as a user without rights, because a superuser has them all."""
    if os.geteuid() == 0:
        os.setuid(65534)
    bank = CoreBank.open(folder)
    told.send((len(bank), bank.get("task-0").metadata["seed"], bank.verify()["ok"]))
    try:
        CoreBank.open(folder, writable=True).remove("task-0")
        told.send("removed")
    except CheckpointError as error:
        told.send(str(error))


def test_a_folder_that_may_not_be_written_is_read(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        locked = shutil.copytree(folder, Path(place) / "bank")
        for file in locked.iterdir():
            file.chmod(0o444)
        locked.chmod(0o555)
        mine, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_reads_without_rights, args=(locked, theirs)
        )
        process.start()
        theirs.close()
        assert mine.recv() == (N, 0, True)
        assert "may not be" in mine.recv()
        process.join()
        assert sorted(p.name for p in locked.iterdir()) == sorted([BANK, CONFIG, BASIS_WEIGHTS, TASKS])
        locked.chmod(0o755)


def test_a_leftover_of_an_unfinished_creation_is_no_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lotr.bank.basis.create_store", fails)
    with pytest.raises(OSError, match="no space"):
        banks.bank(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["basis"]


def test_a_disk_that_fills_up_while_recovering_leaves_no_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def creates_a_small_one(path: Path, basis_hash: str, task_bytes: int) -> None:
        create_store(path, basis_hash, task_bytes)
        opened = TaskStore.__init__

        def opens(store: TaskStore, *words: object, **named: object) -> None:
            opened(store, *words, **named)  # type: ignore[arg-type]
            store._rows("PRAGMA max_page_count = 6")

        monkeypatch.setattr(TaskStore, "__init__", opens)

    bank = CoreBank.open(folder, writable=True)
    bank.add_many(
        Task(f"large-{n}", torch.zeros(bank.layout.size), metadata={"x": "y" * 10**5}) for n in range(9)
    )
    bank.close()
    monkeypatch.setattr("lotr.bank.recover.create_store", creates_a_small_one)
    with pytest.raises(CheckpointError, match="the disk is full"):
        recover(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_recovering_needs_a_free_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        recover(folder, tmp_path / "basis")
    assert recover(folder, tmp_path / "copy") == {"saved": N, "lost": [], "output": str(tmp_path / "copy")}
