"""From `lotr train` into a bank and out again: what was trained answers as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import saved_models
from commands import QUICK, report
from lotr import CoreBank


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "three.csv", rows=96)
    saved_models.write_colours(folder / "two.csv", rows=96, seed=1, labels=("green", "red"))
    words = ("--model", folder / "bert", "--train", folder / "three.csv", *QUICK, "--max-steps", "30")
    report("train", *words, "--output", folder / "first")
    report("bank", "create", folder / "bank", "--basis", folder / "first", "--dtype", "float32")
    return folder


def test_a_task_trained_on_the_bank_leaves_it_as_it_came(place: Path) -> None:
    train = ("--train", place / "two.csv", "--basis", place / "bank", *QUICK)
    trained = report("train", *train, "--output", place / "two")
    assert trained["trained_numbers"]["adapter"] == 4 * 16
    report("bank", "add", place / "bank", place / "first", place / "two")
    task = CoreBank.open(place / "bank").get("two")
    assert (task.labels, task.task) == (("green", "red"), "classification")
    assert task.metadata["columns"]["text"] == "text"
    before = report("evaluate", place / "two", "--data", place / "two.csv")
    for words in ((), ("--refer",), ("--lora",)):
        output = place / f"out{''.join(words)}"
        report("bank", "export", place / "bank", "two", "--output", output, *words)
        after = report("evaluate", output, "--data", place / "two.csv")
        assert after["confusion"] == before["confusion"] and before["accuracy"] > 0.8


def test_a_bank_knows_the_base_model_of_its_basis(place: Path) -> None:
    bank = CoreBank.open(place / "bank")
    record = json.loads((place / "first" / "task.json").read_text())
    assert bank.base_model == str(place / "bert") == record["base_model"]
    assert bank.description.base_fingerprint == record["base_fingerprint"]
