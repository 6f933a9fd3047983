"""`lotr bank`: every command, in this process; and predictions with a bank."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch

import banks
import saved_models
from commands import lotr, refused, report
from lotr import CoreBank


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with the tasks basis and a, b, [bold]c; the first three are adapters beside it too."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        banks.basis(Path("basis"))
        empty = report("bank", "create", "bank", "--basis", "basis", "--dtype", "float32")
        assert empty["numbers_per_task"] == 96 and empty["tasks"] == 0
        with CoreBank.open("bank", writable=True) as opened:
            for seed, name in enumerate(("a", "b"), start=1):
                banks.stirred(opened.config, seed=seed).save_pretrained(name)
            opened.add(banks.task(opened, "[bold]c"))
        added = report("bank", "add", "bank", "basis", "a", "b")
        assert (added["added"], added["tasks"], added["rounding_error"]) == (["basis", "a", "b"], 4, 0.0)
        return Path.cwd()


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return Path("bank")


def _names(bank: Path, *words: str) -> list[str]:
    return [row["name"] for row in report("bank", "list", bank, *words)["shown"]]


def test_tasks_are_listed_shown_counted_added_renamed_and_removed(bank: Path) -> None:
    names = ["[bold]c", "a", "b", "basis"]
    assert _names(bank) == names
    second = report("bank", "list", bank, "--after", "[bold]c", "--limit", "2")
    assert second["tasks"] == 4 and [row["name"] for row in second["shown"]] == ["a", "b"]
    table = lotr("bank", "list", bank).stdout
    assert all(name in table for name in names) and "4 tasks." in table and "classification" in table
    assert "1 of them shown; --limit" in lotr("bank", "list", bank, "--limit", "1").stdout
    shown = report("bank", "show", bank, "[bold]c")
    assert shown["labels"] == ["a", "b", "c"] and shown["numbers"] == 96 and shown["bytes"] == 384
    text = lotr("bank", "show", bank, "[bold]c").stdout
    assert "[bold]c" in text and "rounding error" in text and shown["checksum"] in text
    stats = report("bank", "stats", bank)
    assert (stats["bytes_of_numbers"], stats["kinds"]) == (4 * 384, {"classification": 4})
    assert "bytes of numbers" in lotr("bank", "stats", bank).stdout
    assert report("bank", "add", bank, "a", "--replace")["tasks"] == 4
    assert report("bank", "add", bank, "a", "--task", "x/y")["added"] == ["x/y"]
    assert "[bold]c is now called d/e." in lotr("bank", "rename", bank, "[bold]c", "d/e").stdout
    assert report("bank", "remove", bank, "a", "d/e") == {"removed": ["a", "d/e"], "tasks": 3}
    assert _names(bank) == ["b", "basis", "x/y"]


def test_verify_ends_with_one_where_something_is_damaged(bank: Path) -> None:
    whole = {"ok": True, "tasks": 4, "damaged": [], "files": []}
    assert report("bank", "verify", bank) == whole
    assert "4 of 4 tasks are whole" in lotr("bank", "verify", bank).stdout
    blob = CoreBank.open(bank).store.read("a").numbers
    content = (bank / "tasks.sqlite").read_bytes()
    (bank / "tasks.sqlite").write_bytes(content.replace(blob, bytes([blob[0] ^ 1]) + blob[1:]))
    result = lotr("bank", "verify", bank)
    assert result.exit_code == 1 and "checksum" in result.stdout and "3 of 4 tasks are whole" in result.stdout
    assert "damaged" in lotr("bank", "list", bank).stdout
    result = lotr("bank", "recover", bank, "--output", "new", "--json")
    recovered = json.loads(result.stdout)
    assert (result.exit_code, recovered["saved"], recovered["lost"]) == (1, 3, ["a"])
    assert report("bank", "verify", "new")["tasks"] == 3


def test_verify_reports_every_damage_also_where_a_bank_cannot_be_opened(bank: Path) -> None:
    with closing(sqlite3.connect(bank / "tasks.sqlite")) as connection, connection:
        connection.execute("CREATE VIEW extra AS SELECT 1")
        connection.execute("UPDATE task SET numbers = x'00' WHERE name = 'a'")
    (bank / "bank.json").write_text("{")
    with (bank / "basis.safetensors").open("r+b") as weights:
        weights.truncate(900)
    result = lotr("bank", "verify", bank)
    assert result.exit_code == 1 and "3 of 4 tasks are whole" in result.stdout
    assert "Task 'a'" in " ".join(result.stdout.split())
    told = [line for line in result.stderr.splitlines() if str(bank) in line]
    expected = ("bank.json is damaged", "basis.safetensors is truncated", "'extra'")
    assert len(told) == 3 and all(says in line for says, line in zip(expected, told, strict=True))
    (bank / "adapter_config.json").write_text("[]")
    (bank / "tasks.sqlite").write_bytes(b"none")
    told = json.loads(lotr("bank", "verify", bank, "--json").stdout)
    for name in ("bank.json", "adapter_config.json", "basis.safetensors", "tasks.sqlite"):
        assert any(name in line for line in told["files"])
    assert (told["ok"], told["tasks"]) == (False, 0)
    assert "does not exist" in refused(1, "bank", "verify", "nowhere")


def test_a_bank_that_lost_its_factors_is_still_a_bank(bank: Path) -> None:
    (bank / "basis.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in bank.iterdir()}
    assert "holds no basis.safetensors. Copy the bank again" in refused(1, "bank", "list", bank)
    assert "is a bank of tasks" in refused(1, "merge", bank, "--output", "merged")
    over = ("--output", bank, "--overwrite")
    for line in (
        ("train", "--model", "bert", "--train", "rows.csv"),
        ("export", "basis"),
        ("merge", "basis"),
        ("compress", "basis", "--rank", "1"),
    ):
        assert "is a bank, and neither an adapter nor a model replaces it" in refused(2, *line, *over)
    assert "basis.safetensors" in refused(1, "bank", "recover", bank, "--output", "recovered")
    assert all((bank / name).read_bytes() == content for name, content in before.items())
    assert not Path("recovered").exists()


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("bank show bank bb", 1, "no task 'bb'. Near matches: b"),
        ("bank rename bank a b\x07c", 2, "control character"),
        ("bank add bank a", 2, "'a' already"),
        ("bank add bank", 2, "nothing to add"),
        ("bank add bank a b --task x", 2, "names one task"),
        ("bank add bank c ./c", 2, "c and ./c would both be the task 'c'. Add them one by one with --task"),
        ("bank add bank --train rows.csv", 2, "--task"),
        ("bank add bank c --epochs 5", 2, "--epochs means nothing without --train"),
        ("bank add bank c --label class", 2, "--label means nothing without --train"),
        ("bank train --tasks more.yaml --output bank --keep float16", 2, "keeps its tasks in float32"),
        ("bank add bank a gone --replace", 1, "does not exist"),
        ("bank export bank a --output bank --overwrite", 2, "neither an adapter nor a model replaces it"),
        (
            "bank export bank a --lora --output bank --overwrite",
            2,
            "neither an adapter nor a model replaces it",
        ),
        ("bank list gone", 1, "does not exist"),
        ("bank stats basis", 1, "is not a bank"),
        ("bank train --tasks tasks.yaml --output new", 2, "--basis"),
        ("bank train --basis basis --tasks none.yaml --output new", 2, "No such file"),
        ("predict basis --data rows.csv --output out.csv --task a", 2, "no bank"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(bank: Path, line: str, code: int, says: str) -> None:
    Path("tasks.yaml").write_text("a: rows.csv\n")
    Path("more.yaml").write_text("new: rows.csv\n")
    before = _names(bank)
    assert says in refused(code, *line.split())
    assert _names(bank) == before and not Path("new").exists() and not Path("out.csv").exists()


def test_a_bank_is_trained_grown_and_asked() -> None:
    saved_models.save_bert(Path("bert"))
    for name, labels in {"a": ("red", "green", "blue"), "b": ("red", "blue")}.items():
        saved_models.write_colours(Path(f"{name}.csv"), rows=40, labels=labels)
    words = ("--model", "bert", "--train", "b.csv", "--max-steps", "1", "--rank", "8")
    report("train", *words, "--output", "basis")
    Path("tasks.yaml").write_text("a: a.csv\nb: {train: b.csv, eval: a2.csv}\n")
    saved_models.write_colours(Path("a2.csv"), rows=10, seed=2, labels=("red", "blue"))
    words = ("--basis", "basis", "--tasks", "tasks.yaml", "--output", "bank", "--max-steps", "3")
    trained = report("bank", "train", *words)
    assert trained["steps"] == 3 and trained["tasks"]["b"]["rows"]["eval"] == 10
    words = ("bank", "add", "bank", "--task", "late", "--train", "b.csv", "--max-steps", "30")
    words += ("--core-lr", "0.03", "--head-lr", "0.03")
    assert "1 tasks trained" in lotr(*words).stdout
    assert sorted(CoreBank.open("bank").names()) == ["a", "b", "late"]

    opened = CoreBank.open("bank")
    assert opened.base_model == "bert" and opened.get("late").metadata["columns"]["text"] == "text"
    told = []
    for folder, words in {"whole": (), "refers": ("--refer",), "lora": ("--lora",)}.items():
        exported = report("bank", "export", "bank", "late", "--output", folder, *words)
        told.append(report("evaluate", folder, "--data", "b.csv")["confusion"])
    assert (
        exported["rank"] == 8 and told[0] == told[1] == told[2]
    )  # what was trained answers as before, however it leaves

    def answers(task: str) -> list[str]:
        report("predict", "bank", "--data", "b.csv", "--output", f"of-{task}.csv", "--task", task)
        return [row["prediction"] for row in csv.DictReader(Path(f"of-{task}.csv").read_text().splitlines())]

    wanted = [row["label"] for row in csv.DictReader(Path("b.csv").read_text().splitlines())]
    right = sum(map(str.__eq__, answers("late"), wanted))
    assert right == sum(told[0][n][n] for n in range(2)) > 30
    assert set(answers("a")) <= {"red", "green", "blue"}
    Path("mixed.csv").write_text("text,queue\na red,a\na red,late\n")
    report("predict", "bank", "--data", "mixed.csv", "--output", "mixed.jsonl", "--task-column", "queue")
    lines = [json.loads(line) for line in Path("mixed.jsonl").read_text().splitlines()]
    assert lines[1]["prediction"] in ("red", "blue") and 0 <= lines[1]["confidence"] <= 1
