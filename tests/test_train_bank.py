"""Many tasks trained at once: what is learned, what a task costs, and what a run that stops leaves behind."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import saved_models
from lotr import CoreBank, LotrConfig
from lotr.errors import ConfigError, DataError, TrainingError, UnknownTaskError
from lotr.training.tasks.predict import predict
from lotr.training.tasks.run import RUN, train_bank
from lotr.training.tasks.served import load_served
from lotr.training.tasks.settings import BankSettings
from lotr.training.tasks.task_list import TaskSource, read_tasks

PAIRS = {"first": ("red", "green"), "second": ("green", "blue", "red"), "third": ("blue", "green")}


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a basis on it, and three tasks with two, three and two labels."""
    folder = tmp_path_factory.mktemp("home")
    saved_models.save_bert(folder / "bert")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    adapted = get_peft_model(
        base, LotrConfig(r=16, target_modules="all-linear", exclude_modules=["classifier"])
    )
    adapted.save_pretrained(folder / "basis")
    for n, (name, labels) in enumerate(PAIRS.items()):
        saved_models.write_colours(folder / f"{name}.csv", rows=60, seed=n, labels=labels)
    lines = [f"{name}: {name}.csv" for name in PAIRS]
    (folder / "tasks.yaml").write_text("\n".join(lines))
    return folder


def settings(home: Path, output: Path, **more: Any) -> BankSettings:
    tasks = [task.to_dict() for task in read_tasks(home / "tasks.yaml")]
    common = {
        "basis": str(home / "basis"),
        "tasks": tasks,
        "max_steps": 20,
        "max_length": 16,
        "keep": "float32",
    }
    return BankSettings(output=str(output), **{**common, **more})


def test_all_tasks_are_learned_at_once_and_kept_with_their_labels(home: Path, tmp_path: Path) -> None:
    report = train_bank(settings(home, tmp_path / "bank", max_steps=150), quiet)
    assert {name: found["accuracy"] for name, found in report["tasks"].items()} == dict.fromkeys(PAIRS, 1.0)
    bank = CoreBank.open(tmp_path / "bank")
    assert not (tmp_path / "bank" / RUN).exists()
    for name, labels in PAIRS.items():
        task = bank.get(name)
        assert task.labels == tuple(sorted(labels)) and task.task == "classification"
        assert task.numbers.any() and task.metadata["scores"]["accuracy"] == 1.0
        assert {len(value) for value in task.head.values()} == {len(labels)}

    rows = [("a red thing is", "first"), ("a blue thing is", "third"), ("blue very", "second")]
    mixed = tmp_path / "mixed.csv"
    with mixed.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "which"), *rows])
    answered = predict(load_served(bank), str(mixed), task_column="which")
    assert [row["prediction"] for row in answered] == ["red", "blue", "blue"]
    alone = predict(load_served(bank), str(mixed), task="second")
    assert [row["prediction"] for row in alone[::2]] == ["red", "blue"]


def test_a_task_is_trained_the_same_with_others_and_alone(home: Path, tmp_path: Path) -> None:
    """Batches hold the same rows of the task in both runs: the others must not be felt."""
    common = {"max_steps": 6, "sampling": "uniform", "batch_size": 30}
    train_bank(settings(home, tmp_path / "all", **common), quiet)
    wide = train_bank(settings(home, tmp_path / "narrow", **common), quiet)
    a, b = (CoreBank.open(tmp_path / name).get("first").numbers for name in ("all", "narrow"))
    assert torch.equal(a, b)
    assert wide["steps"] == 6


def test_a_task_is_added_later_and_the_others_stay(home: Path, tmp_path: Path) -> None:
    train_bank(settings(home, tmp_path / "bank"), quiet)
    before = CoreBank.open(tmp_path / "bank").get("first").numbers
    late = [TaskSource("late", str(home / "second.csv")).to_dict()]
    train_bank(settings(home, tmp_path / "bank", basis=None, tasks=late), quiet)
    bank = CoreBank.open(tmp_path / "bank")
    assert sorted(bank.names()) == ["first", "late", "second", "third"]
    assert torch.equal(bank.get("first").numbers, before)
    with pytest.raises(ConfigError, match="task 'late' already"):
        train_bank(settings(home, tmp_path / "bank", basis=None, tasks=late), quiet)


def test_language_models_and_numbers_are_tasks_too(home: Path, tmp_path: Path) -> None:
    saved_models.save_llama(tmp_path / "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    get_peft_model(base, LotrConfig(r=8, target_modules="all-linear")).save_pretrained(tmp_path / "basis")
    for name, answer in (("p", "red"), ("q", "blue")):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(20):
                turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
    tasks = [TaskSource(name, str(tmp_path / f"{name}.jsonl")).to_dict() for name in "pq"]
    chosen = settings(home, tmp_path / "bank", basis=str(tmp_path / "basis"), tasks=tasks, max_steps=60)
    report = train_bank(chosen, quiet)
    assert all(found["loss"] < 0.5 for found in report["tasks"].values())
    with (tmp_path / "ask.jsonl").open("w") as file:
        for name in "pqp":
            turns = [{"role": "user", "content": "what"}]
            file.write(json.dumps({"messages": turns, "task": name}) + "\n")
    made = predict(
        load_served(tmp_path / "bank"), str(tmp_path / "ask.jsonl"), task_column="task", max_new_tokens=1
    )
    assert [row["prediction"].strip() for row in made] == ["red", "blue", "red"]


def test_a_regression_stands_beside_classes(home: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.csv"
    with numbers.open("w", newline="") as file:
        csv.writer(file).writerow(("text", "label"))
        for n in range(60):
            csv.writer(file).writerow((("red " * 2 + "a the" if n % 2 else "blue is was"), n % 2 + 0.5))
    tasks = [
        TaskSource("size", str(numbers)).to_dict(),
        TaskSource("colour", str(home / "first.csv")).to_dict(),
    ]
    report = train_bank(settings(home, tmp_path / "bank", tasks=tasks, max_steps=80), quiet)
    assert report["tasks"]["size"]["mse"] < 0.05 and report["tasks"]["colour"]["accuracy"] == 1.0
    made = predict(load_served(tmp_path / "bank"), str(numbers), task="size")
    assert abs(made[1]["prediction"] - 1.5) < 0.5


# ---------------------------------------------------------------------- runs that stop


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(home: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 14:
                raise KeyboardInterrupt

    common = {"max_steps": 20, "save_steps": 5, "batch_size": 2}
    train_bank(settings(home, tmp_path / "whole", **common), quiet)
    with pytest.raises(KeyboardInterrupt):
        train_bank(settings(home, tmp_path / "cut", **common), quiet, [Kill()])
    assert len(CoreBank.open(tmp_path / "cut")) >= 1  # the tasks as of step 10
    with pytest.raises(ConfigError, match="not finished"):
        train_bank(settings(home, tmp_path / "cut", basis=None, **common), quiet)
    train_bank(BankSettings(output=str(tmp_path / "cut"), resume=True), quiet)
    for name in PAIRS:
        whole, cut = (CoreBank.open(tmp_path / bank).get(name) for bank in ("whole", "cut"))
        assert torch.allclose(whole.numbers, cut.numbers, atol=1e-6)
        assert all(torch.allclose(value, cut.head[key], atol=1e-6) for key, value in whole.head.items())


def test_runs_killed_at_random_points_lose_nothing_that_was_saved(home: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks: a child trains, is killed, and another one goes on."""
    chosen = vars(settings(home, tmp_path / "bank", max_steps=400, save_steps=2, batch_size=2))
    command = [sys.executable, str(Path(__file__).with_name("killed_training.py")), json.dumps(chosen), "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["killed"] >= 10 and said["advanced"] >= 3
    train_bank(BankSettings(output=str(tmp_path / "bank"), resume=True), quiet)
    assert sorted(CoreBank.open(tmp_path / "bank").names()) == sorted(PAIRS)


def test_a_loss_that_is_not_finite_names_its_task(home: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss of task 'first'"):
        train_bank(settings(home, tmp_path / "bank", core_lr=1e30, save_steps=1), quiet)


# ---------------------------------------------------------------------- bad input


def test_tasks_that_do_not_fit_into_memory_are_refused_with_their_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotr.training.tasks.run.os.sysconf", lambda name: 64)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"these need [\d,]+ bytes, [\d,]+ a task, and there are 4,096"):
        train_bank(settings(home, tmp_path / "bank"), lines.append)
    assert "bytes of memory a task" in lines[0]


def test_a_list_of_tasks_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    for content, message in (
        ("a: {train: x.csv, lable: y}", "Near matches: label"),
        ("a: {label: y}", "names no data"),
        ("- a\n- b", "tasks by name"),
        ("a: {b", "not valid YAML"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_tasks(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_tasks(tmp_path / "none.yaml")


def test_what_cannot_be_trained_says_so(home: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nred,a\nblue,a\n")
    for more, error, message in (
        ({"tasks": [TaskSource("x", str(bad)).to_dict()]}, DataError, "Task 'x': All rows"),
        ({"tasks": []}, ConfigError, "no tasks to train"),
        ({"basis": None}, ConfigError, "holds no bank yet"),
        ({"sampling": "often"}, ConfigError, "sampling='often'"),
        ({"resume": True}, ConfigError, "nothing to resume"),
    ):
        with pytest.raises(error, match=message):
            train_bank(settings(home, tmp_path / "bank", **more), quiet)
        assert not (tmp_path / "bank").exists()


def test_prediction_names_what_is_wrong(home: Path, tmp_path: Path) -> None:
    train_bank(settings(home, tmp_path / "bank", max_steps=1), quiet)
    served = load_served(tmp_path / "bank")
    data = str(home / "first.csv")
    with pytest.raises(UnknownTaskError, match="'firts'"):
        predict(served, data, task="firts")
    with pytest.raises(ConfigError, match="Give one of"):
        predict(served, data)
    with pytest.raises(DataError, match='no column "which"'):
        predict(served, data, task_column="which")
