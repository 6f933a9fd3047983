"""Many tasks trained at once: what is learned, what a task costs, and what a run that stops leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

import saved_models
from commands import quiet
from lotr import CoreBank, LotrConfig
from lotr.errors import CheckpointError, ConfigError, DataError, TrainingError, UnknownTaskError
from lotr.files.atomic import locked
from lotr.training.predict import predict
from lotr.training.tasks.run import train_bank
from lotr.training.tasks.served import load_served
from lotr.training.tasks.settings import BankSettings
from lotr.training.tasks.task_list import TaskSource, read_tasks
from lotr.training.trained import CHECKPOINTS

PAIRS = {"first": ("red", "green"), "second": ("green", "blue", "red"), "third": ("blue", "green")}


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


def settings(home: Path, output: Path, sources: list[TaskSource] | None = None, **more: Any) -> BankSettings:
    """Few steps on some tasks, or on those of the list."""
    tasks = tuple(vars(source) for source in sources or read_tasks(home / "tasks.yaml"))
    few = {"basis": str(home / "basis"), "max_steps": 20, "max_length": 16, "keep": "float32"}
    return BankSettings(output=str(output), **{"tasks": tasks, **few, **more})


def jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows and return the path."""
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_all_tasks_are_learned_at_once_and_kept_with_their_labels(home: Path, tmp_path: Path) -> None:
    report = train_bank(settings(home, tmp_path / "bank", max_steps=150), quiet)
    assert {name: own["accuracy"] for name, own in report["tasks"].items()} == dict.fromkeys(PAIRS, 1.0)
    bank = CoreBank.open(tmp_path / "bank")
    assert not (tmp_path / "bank" / CHECKPOINTS).exists()
    for name, labels in PAIRS.items():
        task = bank.get(name)
        assert task.labels == tuple(sorted(labels)) and task.task == "classification"
        assert task.numbers.any() and task.metadata["scores"]["accuracy"] == 1.0
        assert {len(value) for value in task.head.values()} == {len(labels)}

    rows = [("a red thing is", "first"), ("a blue thing is", "third"), ("blue very", "second")]
    mixed = jsonl(tmp_path / "mixed.jsonl", [{"text": text, "which": name} for text, name in rows])
    served = load_served(bank)
    answered = predict(served, mixed, task_column="which")
    assert [row["prediction"] for row in answered] == ["red", "blue", "blue"]
    alone = predict(served, mixed, task="second")
    assert [row["prediction"] for row in alone[::2]] == ["red", "blue"]
    for more, error, message in (
        ({"task": "firts"}, UnknownTaskError, "'firts'"),
        ({}, ConfigError, "Give one of"),
        ({"task_column": "what"}, DataError, 'no column "what".*--task-column'),
    ):
        with pytest.raises(error, match=message):
            predict(served, mixed, **more)


def test_a_task_is_trained_the_same_with_others_and_alone(home: Path, tmp_path: Path) -> None:
    """A batch holds all rows of the task in both runs: the others must not be felt."""
    rows = 54  # of the 60; the others are held out
    saved_models.save_bert(tmp_path / "bert", dropout=0.0)
    common = {"max_steps": 6, "sampling": "uniform", "model": str(tmp_path / "bert")}
    train_bank(settings(home, tmp_path / "all", batch_size=3 * rows, **common), quiet)
    first = [source for source in read_tasks(home / "tasks.yaml") if source.name == "first"]
    train_bank(settings(home, tmp_path / "alone", first, batch_size=rows, **common), quiet)
    a, b = (CoreBank.open(tmp_path / name).get("first") for name in ("all", "alone"))
    assert torch.allclose(a.numbers, b.numbers, atol=1e-5) and a.numbers.abs().max() > 1e-3
    assert all(torch.allclose(value, b.head[name], atol=1e-5) for name, value in a.head.items())


def test_a_task_is_added_later_and_the_others_stay(home: Path, tmp_path: Path) -> None:
    train_bank(settings(home, tmp_path / "bank"), quiet)
    before = CoreBank.open(tmp_path / "bank").get("first").numbers
    late = settings(home, tmp_path / "bank", [TaskSource("late", str(home / "second.csv"))], basis=None)
    train_bank(late, quiet)
    bank = CoreBank.open(tmp_path / "bank")
    assert sorted(bank.names()) == ["first", "late", "second", "third"]
    assert torch.equal(bank.get("first").numbers, before)
    with pytest.raises(ConfigError, match="task 'late' already"):
        train_bank(late, quiet)


def test_language_models_are_tasks_too(home: Path, tmp_path: Path) -> None:
    saved_models.save_llama(tmp_path / "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    get_peft_model(base, LotrConfig(r=8, target_modules="all-linear")).save_pretrained(tmp_path / "basis")
    question, sources = {"role": "user", "content": "what"}, []
    for name, answer in (("p", "red"), ("q", "blue")):
        turns = [question, {"role": "assistant", "content": answer}]
        sources.append(TaskSource(name, jsonl(tmp_path / f"{name}.jsonl", [{"messages": turns}] * 20)))
    chosen = settings(home, tmp_path / "bank", sources, basis=str(tmp_path / "basis"), max_steps=60)
    report = train_bank(chosen, quiet)
    assert all(own["loss"] < 0.5 for own in report["tasks"].values())
    asked = jsonl(tmp_path / "ask.jsonl", [{"messages": [question], "task": name} for name in "pqp"])
    answered = predict(load_served(tmp_path / "bank"), asked, task_column="task", max_new_tokens=1)
    assert [row["prediction"].strip() for row in answered] == ["red", "blue", "red"]


def test_a_regression_stands_beside_classes(home: Path, tmp_path: Path) -> None:
    rows = [{"text": "red red a the", "label": 1.5}, {"text": "blue is was", "label": 0.5}] * 30
    numbers = jsonl(tmp_path / "numbers.jsonl", rows)
    sources = [TaskSource("size", numbers), TaskSource("colour", str(home / "first.csv"))]
    report = train_bank(settings(home, tmp_path / "bank", sources, max_steps=80), quiet)
    assert report["tasks"]["size"]["mse"] < 0.05 and report["tasks"]["colour"]["accuracy"] == 1.0
    answered = predict(load_served(tmp_path / "bank"), numbers, task="size")
    assert abs(answered[0]["prediction"] - 1.5) < 0.5


# ---------------------------------------------------------------------- runs that stop


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(home: Path, tmp_path: Path) -> None:
    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 14:
                raise KeyboardInterrupt

    class Saves(TrainerCallback):
        def __init__(self, saved: list[int]) -> None:
            self.saved = saved

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved.append(state.global_step)

    common = {"max_steps": 20, "save_steps": 5, "batch_size": 2}
    train_bank(settings(home, tmp_path / "whole", **common), quiet)
    with pytest.raises(KeyboardInterrupt):
        train_bank(settings(home, tmp_path / "cut", **common), quiet, [Kill()])
    assert len(CoreBank.open(tmp_path / "cut")) >= 1  # the tasks as of step 10
    with pytest.raises(ConfigError, match="not finished"):
        train_bank(settings(home, tmp_path / "cut", basis=None, **common), quiet)
    again = BankSettings(output=str(tmp_path / "cut"), resume=True)
    with pytest.raises(ConfigError, match="batch_size was 2, not 4"):
        train_bank(replace(again, batch_size=4), quiet)
    with pytest.raises(ConfigError, match="batch_size was 2, not 32"):  # also where that is the default
        train_bank(again, quiet, batch_size=32)
    with locked(tmp_path / "cut"), pytest.raises(ConfigError, match="Another run is writing"):
        train_bank(again, quiet)
    saved: list[int] = []
    train_bank(again, quiet, [Saves(saved)], save_steps=2)
    assert saved == [12, 14, 16, 18, 20]
    for name in PAIRS:
        whole, cut = (CoreBank.open(tmp_path / bank).get(name) for bank in ("whole", "cut"))
        assert torch.equal(whole.numbers, cut.numbers)
        assert all(torch.equal(value, cut.head[key]) for key, value in whole.head.items())


def test_a_run_does_not_go_on_with_the_factors_of_another_bank(home: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bank(settings(home, tmp_path / "bank", save_steps=2), quiet, [Stop()])
    other = AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=2)
    fields = {"r": 16, "target_modules": "all-linear", "exclude_modules": ["classifier"], "seed": 1}
    get_peft_model(other, LotrConfig(**fields)).save_pretrained(tmp_path / "basis")
    CoreBank.create(tmp_path / "other", tmp_path / "basis", dtype="float32").close()
    for file in (tmp_path / "other").iterdir():  # as what replaces a bank does
        file.replace(tmp_path / "bank" / file.name)
    with pytest.raises(CheckpointError, match="other factors"):
        train_bank(BankSettings(output=str(tmp_path / "bank"), resume=True), quiet)


def test_a_loss_that_is_not_finite_names_its_task(home: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss of task 'first'"):
        train_bank(settings(home, tmp_path / "bank", core_lr=1e30, save_steps=1), quiet)


# ---------------------------------------------------------------------- bad input


def test_a_list_of_tasks_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    for content, message in (
        ("a: {train: x.csv, lable: y}", "task 'a' names 'lable'.*Near matches: label"),
        ("a: {train: x.csv, label: yes}", "label='True' is not a value of type str"),
        ("a: {label: y}", "names no data"),
        ("- a\n- b", "tasks by name"),
        ("a: {b", "not valid YAML"),
        ("a: x.csv\na: y.csv", "'a' is there twice"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_tasks(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_tasks(tmp_path / "none.yaml")
    path.write_text("no: a.csv\n010: b.csv\n2024-01-01: c.csv")
    assert [task.name for task in read_tasks(path)] == ["no", "010", "2024-01-01"]


def test_what_cannot_be_trained_says_so(home: Path, tmp_path: Path) -> None:
    one_label = jsonl(tmp_path / "bad.jsonl", [{"text": "red", "label": "a"}, {"text": "blue", "label": "a"}])
    texts = TaskSource("x", str(home / "first.csv"), task="causal-lm")
    for sources, more, error, message in (
        ([TaskSource("x", one_label)], {}, DataError, "Task 'x': All rows"),
        ([texts, TaskSource("y", texts.train)], {}, ConfigError, "'x' is causal-lm and others are"),
        ([texts, texts], {}, ConfigError, "Two tasks are called 'x'"),
        (None, {"tasks": ()}, ConfigError, "no tasks to train"),
        (None, {"basis": None}, ConfigError, "holds no bank yet"),
        (None, {"sampling": "often"}, ConfigError, "sampling='often'"),
        (None, {"epochs": math.inf}, ConfigError, "epochs=inf is out of range"),
        (None, {"seed": -1}, ConfigError, "seed=-1 is out of range"),
        (None, {"warmup": 2.0}, ConfigError, "warmup=2.0 is out of range"),
        (None, {"resume": True}, ConfigError, "nothing to resume"),
    ):
        with pytest.raises(error, match=message):
            train_bank(settings(home, tmp_path / "bank", sources, **more), quiet)
        assert not (tmp_path / "bank").exists()
    (tmp_path / "project" / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / "project" / CHECKPOINTS / "mine.txt").write_text("no run of a bank")
    with pytest.raises(ConfigError, match="nothing to resume"):
        train_bank(BankSettings(output=str(tmp_path / "project"), resume=True), quiet)
    assert (tmp_path / "project" / CHECKPOINTS / "mine.txt").exists()


def test_several_processes_are_refused_before_anything_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Tasks of a bank train in one process"):
        train_bank(settings(home, tmp_path / "bank"), quiet)
    assert not (tmp_path / "bank").exists()
