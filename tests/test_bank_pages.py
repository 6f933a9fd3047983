"""The arithmetic of pages, against files that SQLite wrote."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lotr.bank.pages import SIZES, page_size, row_bytes


@pytest.mark.parametrize("page", SIZES)
@pytest.mark.parametrize("row", [300, 6300, 12500, 33000, 70000])
def test_rows_take_the_bytes_that_the_format_says(tmp_path: Path, row: int, page: int) -> None:
    connection = sqlite3.connect(tmp_path / "rows.sqlite", isolation_level=None)
    connection.execute(f"PRAGMA page_size = {page}")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, numbers BLOB)")
    n = 2_000_000 // row + 200
    connection.execute("BEGIN")
    header = 5  # its own length, one byte for the id, three for the length of the blob
    connection.executemany("INSERT INTO t VALUES (NULL, ?)", ((bytes(row - header),) for _ in range(n)))
    connection.execute("COMMIT")
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    assert pages * page == pytest.approx(n * row_bytes(row, page), rel=0.04, abs=3 * page)


@pytest.mark.parametrize("numbers", [192, 3072, 6144, 12288, 16384, 20480, 32768, 65536, 500_000])
def test_the_page_size_wastes_at_most_an_eighth_beside_a_hundred_bytes(numbers: int) -> None:
    row = numbers + 110
    assert row_bytes(row, page_size(numbers)) <= 1.125 * row
