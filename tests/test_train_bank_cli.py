"""The commands that train into a bank and predict with one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import saved_models
from lotr import CoreBank, LotrConfig
from lotr_cli.app import app

RUN = CliRunner()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    saved_models.save_bert(tmp_path / "bert")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    get_peft_model(base, LotrConfig(r=8, target_modules=["query", "value"])).save_pretrained(
        tmp_path / "basis"
    )
    saved_models.write_colours(tmp_path / "a.csv", rows=40)
    saved_models.write_colours(tmp_path / "b.csv", rows=40, seed=1, labels=("red", "blue"))
    (tmp_path / "tasks.yaml").write_text("a: a.csv\nb: {train: b.csv, eval: a2.csv}\n")
    saved_models.write_colours(tmp_path / "a2.csv", rows=10, seed=2, labels=("red", "blue"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(line: str, code: int = 0) -> str:
    result = RUN.invoke(app, line.split())
    assert result.exit_code == code, result.output
    return result.output


def test_a_bank_is_trained_grown_and_asked(home: Path) -> None:
    trained = call("bank train --basis basis --tasks tasks.yaml --output bank --max-steps 3 --json")
    report = json.loads(trained[trained.index("{") :])
    assert report["steps"] == 3 and report["tasks"]["b"]["rows"]["eval"] == 10
    assert "1 tasks trained" in call("bank add bank --task late --train b.csv --max-steps 2")
    assert sorted(CoreBank.open(home / "bank").names()) == ["a", "b", "late"]

    call("predict bank --data b.csv --output out.csv --task a")
    with (home / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and {row["prediction"] for row in rows} <= {"red", "green", "blue"}

    (home / "mixed.csv").write_text("text,queue\na red,a\na red,late\n")
    call("predict bank --data mixed.csv --output mixed.jsonl --task-column queue")
    lines = [json.loads(line) for line in (home / "mixed.jsonl").read_text().splitlines()]
    assert lines[1]["prediction"] in ("red", "blue") and 0 <= lines[1]["confidence"] <= 1


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("bank train --tasks tasks.yaml --output new", 2, "--basis"),
        ("bank train --basis basis --tasks none.yaml --output new", 2, "does not exist"),
        ("bank add basis --train a.csv", 2, "--task"),
        ("bank add basis", 2, "nothing to add"),
        ("predict basis --data a.csv --output out.csv --task a", 2, "no bank"),
    ],
)
def test_wrong_calls_say_what_is_wrong(home: Path, line: str, code: int, says: str) -> None:
    assert says in call(line, code)
    assert not (home / "new").exists() and not (home / "out.csv").exists()
