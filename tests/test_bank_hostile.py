"""A bank from someone else: nothing in its file runs, nothing is endless, no row is believed for its checksum."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch

import banks
from lotr import CheckpointError, CoreBank
from lotr.bank.basis import TASKS
from lotr.bank.recover import recover
from lotr.bank.task import Record

N = 60
_RENAMED = "ALTER TABLE task RENAME TO other; "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    banks.bank(tmp_path, tasks=N).close()
    return tmp_path / "bank"


def script(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / TASKS)) as connection:
        connection.executescript(sql)


@pytest.mark.parametrize(
    "sql, recovered",
    [
        ("CREATE TRIGGER t AFTER INSERT ON task BEGIN DELETE FROM task WHERE name = new.name; END", N),
        ("CREATE VIEW v AS SELECT * FROM task", N),
        ("CREATE INDEX i ON task (length(about))", N),
        ("CREATE TABLE more (x)", N),
        (_RENAMED + "CREATE VIEW task AS SELECT * FROM other", 0),
        (
            _RENAMED
            + "CREATE VIEW task AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS"
            " id, 'x' || i AS name, zeroblob(1000000) AS numbers FROM n",
            0,
        ),
        ("ALTER TABLE task ADD COLUMN more TEXT AS (name || hex(zeroblob(100000)))", 0),
    ],
    ids=["trigger", "view", "index", "table", "renamed", "endless", "computed"],
)
def test_sql_that_somebody_put_into_the_file_is_refused_and_never_runs(
    folder: Path, tmp_path: Path, sql: str, recovered: int
) -> None:
    script(folder, sql)
    before = (folder / TASKS).read_bytes()
    with pytest.raises(CheckpointError, match=r"not made by this library: '\w+' is not as in a bank"):
        CoreBank.open(folder, writable=True)
    if recovered:  # the rows are there, and reading them runs nothing
        assert recover(folder, tmp_path / "new")["saved"] == recovered
        assert CoreBank.open(tmp_path / "new").verify()["ok"]
    else:
        with pytest.raises(CheckpointError, match="'task' is not as in a bank"):
            recover(folder, tmp_path / "new")
    assert (folder / TASKS).read_bytes() == before


@pytest.mark.parametrize("name", ["zeroblob(20000000)", "CAST('task-5' AS BLOB)", "x'ff41'", "7.5"])
def test_a_name_that_is_no_text_makes_no_list_endless(folder: Path, name: str) -> None:
    script(folder, f"UPDATE task SET name = {name} WHERE name = 'task-7'")
    bank = CoreBank.open(folder)
    for limit in (1, 7):
        seen: list[str] = []
        while page := bank.overview(seen[-1] if seen else "", limit):
            seen += [row["name"] for row in page]
            assert len(seen) <= N
        assert set(seen) >= {f"task-{n}" for n in range(N)} - {"task-7"}
    assert len(bank.verify()["damaged"]) == 1


def _knot(folder: Path, table: str) -> None:
    """Put a tree of eight levels in place of a table's or an index's, each page with a hundred times the same child."""
    with closing(sqlite3.connect(folder / TASKS)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,))
    content = bytearray((folder / TASKS).read_bytes())
    size = {1: 65536}.get(page := int.from_bytes(content[16:18]), page)
    inner, leaf = (5, 13) if table == "task" else (2, 10)
    last = len(content) // size
    child = next(n for n in range(1, last) if content[n * size] == leaf) + 1
    for level in range(8):
        page = bytearray(size)
        at, count = size, 60
        for n in range(count):  # a child, and the largest key of its rows
            cell = child.to_bytes(4) + (b"\x07" if inner == 5 else b"\x05\x03\x0f\x01\x61\x07")
            at -= len(cell)
            page[at : at + len(cell)] = cell
            page[12 + 2 * n : 14 + 2 * n] = at.to_bytes(2)
        page[:12] = bytes([inner, 0, 0]) + count.to_bytes(2) + at.to_bytes(2) + b"\0" + child.to_bytes(4)
        if level == 7:
            content[(root - 1) * size : root * size] = page
        else:
            content += page
            last += 1
            child = last
    content[28:32] = last.to_bytes(4)
    (folder / TASKS).write_bytes(content)


@pytest.mark.parametrize("table", ["task", "task_name"])
def test_pages_that_point_to_each_other_end_in_an_error(tmp_path: Path, table: str) -> None:
    bank = banks.bank(tmp_path, r=6)
    bank.add_many(banks.task(bank, f"task-{n}", seed=n) for n in range(100))
    bank.close()
    folder = tmp_path / "bank"
    _knot(folder, table)
    bank = CoreBank.open(folder)
    walks = {
        "task": [lambda: bank.store.summary(), lambda: list(bank.store.with_head("x") or ())],
        "task_name": [lambda: len(bank), lambda: list(bank.names()), bank.store.ids],
    }
    for walk in walks[table]:
        with pytest.raises(CheckpointError, match=r"reading it does not end|is damaged"):
            walk()
    assert not bank.verify()["ok"]


def test_a_rollback_journal_beside_a_bank_is_not_obeyed(folder: Path) -> None:
    journal = folder / f"{TASKS}-journal"
    journal.write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(2000))
    before = (folder / TASKS).read_bytes()
    with pytest.raises(CheckpointError, match="has a write-ahead log, and no rollback journal"):
        CoreBank.open(folder, writable=True)
    assert journal.exists() and (folder / TASKS).read_bytes() == before


_DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "fields",
    [
        {"numbers": "text"},
        {"numbers": None},
        {"numbers": torch.full((96,), math.nan).numpy().tobytes()},
        {"head": b"\xff" * 40},
        {"head": 5},
        {"dtype": "int4"},
        {"dtype": b"float32"},
        {"created": "today"},
        {"created": 1e300},
        {"error": "none"},
        {"about": b"{}"},
        {"about": "[]"},
        {"about": _DEEP},
        {"about": '{"metadata": ' + _DEEP + "}"},
        *({"about": json.dumps(about)} for about in ({"labels": 5}, {"labels": [5]}, {"labels": "abc"})),
        *({"about": json.dumps(about)} for about in ({"metadata": [1]}, {"task": 5}, {"task": ["x"]})),
        {"about": "1" * 5000},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_row_with_a_right_checksum_is_read_as_carefully(folder: Path, fields: dict[str, object]) -> None:
    with closing(sqlite3.connect(folder / TASKS)) as connection, connection:
        columns = "name, dtype, created, error, about, numbers, head, checksum"
        row = connection.execute(f"SELECT {columns} FROM task WHERE name = 'task-7'").fetchone()
        record = Record(*row)
        odd = Record(**{**vars(record), **fields}).sealed()
        sets = ", ".join(f"{name.strip()} = ?" for name in columns.split(","))
        values = ["" if value is None else value for value in vars(odd).values()]
        connection.execute(f"UPDATE task SET {sets} WHERE name = 'task-7'", values)
    bank = CoreBank.open(folder)
    for read in (bank.get, bank.about):
        with pytest.raises(CheckpointError, match="Task 'task-7'"):
            read("task-7")
    assert len(bank.overview()) == N and bank.stats()["tasks"] == N
    assert [damage["task"] for damage in bank.verify()["damaged"]] == ["task-7"]
