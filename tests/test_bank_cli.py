"""`lotr bank`: every command, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from typer.testing import CliRunner

import banks
from conftest import bert
from lotr import CoreBank
from lotr_cli.app import app


def lotr(*words: str | Path):
    return CliRunner().invoke(app, ["bank", *(str(word) for word in words)], env={"COLUMNS": "200"})


def report(*words: str | Path) -> dict:
    result = lotr(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*words: str | Path) -> str:
    result = lotr(*words)
    assert result.exit_code in (1, 2) and not result.stdout, result.stdout
    assert "Traceback" not in result.stderr and "Unexpected" not in result.stderr
    return result.stderr


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A bank with the tasks basis and a, b, [bold]c."""
    made = report(
        "create", tmp_path / "bank", "--basis", banks.basis(tmp_path / "basis"), "--dtype", "float32"
    )
    assert made["numbers_per_task"] == 96 and made["tasks"] == 0
    with CoreBank.open(tmp_path / "bank", writable=True) as opened:
        for seed, name in enumerate(("a", "b"), start=1):
            banks.stirred(opened.config, seed=seed).save_pretrained(tmp_path / name)
        opened.add(banks.task(opened, "[bold]c"))
    added = report("add", tmp_path / "bank", tmp_path / "basis", tmp_path / "a", tmp_path / "b")
    assert (added["added"], added["tasks"], added["rounding_error"]) == (["basis", "a", "b"], 4, 0.0)
    return tmp_path / "bank"


def test_tasks_are_listed_a_page_at_a_time(bank: Path) -> None:
    names = ["[bold]c", "a", "b", "basis"]
    assert [row["name"] for row in report("list", bank)["shown"]] == names
    second = report("list", bank, "--after", "[bold]c", "--limit", "2")
    assert second["tasks"] == 4 and [row["name"] for row in second["shown"]] == ["a", "b"]
    table = lotr("list", bank).stdout
    assert all(name in table for name in names) and "4 tasks." in table and "classification" in table
    assert "1 of them shown; --limit" in lotr("list", bank, "--limit", "1").stdout


def test_a_task_is_shown(bank: Path) -> None:
    shown = report("show", bank, "[bold]c")
    assert shown["labels"] == ["a", "b", "c"] and shown["numbers"] == 96 and shown["bytes"] == 384
    assert shown["metadata"] == {"seed": 0}
    text = lotr("show", bank, "[bold]c").stdout
    assert "[bold]c" in text and "rounding error" in text and shown["checksum"] in text
    assert "no task 'bb'. Near matches: b" in refused("show", bank, "bb")


def test_tasks_are_renamed_and_removed(bank: Path) -> None:
    assert "[bold]c is now called d/e." in lotr("rename", bank, "[bold]c", "d/e").stdout
    assert "'b' already" in refused("rename", bank, "a", "b")
    assert "control character" in refused("rename", bank, "a", "b\nc")
    assert "no task 'gone'" in refused("remove", bank, "a", "gone")
    assert report("remove", bank, "a", "d/e") == {"removed": ["a", "d/e"], "tasks": 2}
    assert [row["name"] for row in report("list", bank)["shown"]] == ["b", "basis"]


def test_adapters_are_added_all_or_none(bank: Path, tmp_path: Path) -> None:
    assert "'a' already" in refused("add", bank, tmp_path / "a")
    assert "names one task" in refused("add", bank, tmp_path / "a", tmp_path / "b", "--task", "x")
    assert "does not exist" in refused("add", bank, tmp_path / "a", tmp_path / "gone", "--replace")
    assert report("add", bank, tmp_path / "a", "--replace")["tasks"] == 4
    assert report("add", bank, tmp_path / "a", "--task", "x/y")["added"] == ["x/y"]


def test_a_task_leaves_as_an_adapter(bank: Path, tmp_path: Path) -> None:
    whole = report("export", bank, "a", "--output", tmp_path / "out")
    refers = report("export", bank, "a", "--output", tmp_path / "refers", "--refer")
    lora = report("export", bank, "a", "--output", tmp_path / "lora", "--lora")
    assert whole["numbers"] > refers["numbers"] == 96 and lora["rank"] == 4
    for folder in ("out", "refers", "lora"):
        PeftModel.from_pretrained(bert(), tmp_path / folder)
    assert "not empty" in refused("export", bank, "a", "--output", tmp_path / "out")
    assert "is in" in lotr("export", bank, "a", "--output", tmp_path / "out", "--overwrite").stdout


def test_verify_ends_with_one_where_something_is_damaged(bank: Path, tmp_path: Path) -> None:
    assert report("verify", bank) == {"ok": True, "tasks": 4, "damaged": [], "file": [], "basis": None}
    assert "4 of 4 tasks are whole" in lotr("verify", bank).stdout
    blob = CoreBank.open(bank).store.read("a").numbers
    content = (bank / "tasks.sqlite").read_bytes()
    (bank / "tasks.sqlite").write_bytes(content.replace(blob, bytes([blob[0] ^ 1]) + blob[1:]))
    result = lotr("verify", bank)
    assert result.exit_code == 1 and "checksum" in result.stdout and "3 of 4 tasks are whole" in result.stdout
    assert json.loads(lotr("verify", bank, "--json").stdout)["damaged"][0]["task"] == "a"
    assert "damaged" in lotr("list", bank).stdout
    result = lotr("recover", bank, "--output", tmp_path / "new", "--json")
    recovered = json.loads(result.stdout)
    assert (result.exit_code, recovered["saved"], recovered["lost"]) == (1, 3, ["a"])
    assert report("verify", tmp_path / "new")["tasks"] == 3


def test_stats_count_bytes(bank: Path) -> None:
    found = report("stats", bank)
    assert (found["tasks"], found["bytes_of_numbers"]) == (4, 4 * 384)
    assert found["kinds"] == {"classification": 1, "unknown": 3}
    assert "bytes of numbers" in lotr("stats", bank).stdout


def test_what_is_no_bank_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused("list", tmp_path / "gone")
    assert "is not a bank" in refused("stats", banks.basis(tmp_path / "basis"))
    assert "dtype='int3'" in refused(
        "create", tmp_path / "x", "--basis", tmp_path / "basis", "--dtype", "int3"
    )
