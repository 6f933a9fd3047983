"""Before the first step: a new head warms up, factors turn towards data, or those of another adapter are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from commands import QUICK, lotr, report, training
from conftest import bert, painted, tokens
from lotr import LotrConfig
from lotr.files.adapter_folder import CONFIG, WEIGHTS
from lotr.training.output import METRICS
from lotr.training.prepare import warm_head

GRADIENT = ("--init", "gradient", "--start-batches", "3", "--head-warmup", "5")


def _train(place: Path, output: str, *words: str | Path) -> dict:
    return report(*training(place), "--output", place / output, *QUICK, *words)


@pytest.fixture(scope="module")
def started(place: Path) -> dict:
    return _train(place, "started", *GRADIENT)


def test_a_run_that_starts_from_gradients_says_so_in_its_record(started: dict, place: Path) -> None:
    assert started["begun"] == {"head_warmup": 5, "init": "gradient", "start_batches": 3}
    assert started["accuracy"] > 0.9
    assert json.loads((place / "started" / CONFIG).read_text())["init"] == "gradient"
    again = report("evaluate", place / "started", "--data", place / "dev.csv")
    assert again["accuracy"] == pytest.approx(started["accuracy"])


def test_a_new_head_warms_up_by_default(place: Path) -> None:
    short = ("--max-steps", "10")
    warm, cold = _train(place, "warm", *short), _train(place, "cold", *short, "--head-warmup", "0")
    assert warm["begun"]["head_warmup"] == min(20, warm["steps"] // 5) > 0 == cold["begun"]["head_warmup"]


def test_cores_alone_start_from_gradients_and_say_so_unless_told_otherwise(place: Path) -> None:
    words = ("--output", place / "cores", *QUICK, "--max-steps", "2", "--trainable", "cores")
    lines = " ".join(lotr(*training(place), *words).stderr.split())
    assert "turned towards the gradients of 8 batches, because they stay as they start" in lines
    assert "Rates: cores 0.03, head 0.03." in lines
    begun = json.loads((place / "cores" / METRICS).read_text())["begun"]
    assert begun["init"] == "gradient" and begun["start_batches"] == 8
    assert json.loads((place / "cores" / CONFIG).read_text())["init"] == "gradient"
    told = _train(place, "told", "--trainable", "cores", "--init", "orthonormal", "--max-steps", "1")
    assert "init" not in told["begun"]
    xs = _train(place, "xs", "--method", "lora_xs", "--max-steps", "1")  # has a start of its own
    assert "init" not in xs["begun"]


def test_two_runs_with_one_seed_give_identical_files_and_another_seed_another_adapter(place: Path) -> None:
    words = (*GRADIENT, "--max-steps", "30")  # into the third epoch
    with painted():
        one, again = (_train(place, name, *words) for name in ("one", "again"))
    _train(place, "other", *words, "--seed", "1")
    for name in (WEIGHTS, CONFIG, "task.json", "README.md", "curve.png"):
        assert (place / "again" / name).read_bytes() == (place / "one" / name).read_bytes(), name
    varying = {"seconds", "peak_memory_bytes", "settings", "history"}
    assert all(one[name] == again[name] for name in one.keys() - varying)
    assert (place / "other" / WEIGHTS).read_bytes() != (place / "one" / WEIGHTS).read_bytes()


def test_a_warmed_up_head_leaves_the_adapter_where_it_was() -> None:
    model = get_peft_model(bert(), LotrConfig(r=4, task_type="SEQ_CLS"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    batch = {"input_ids": tokens(12), "labels": torch.arange(12) % 3}
    losses = [model(**batch).loss.item()]
    warm_head(model, iter([[(1.0, batch)]] * 30), 30, lr=3e-2)
    losses.append(model(**batch).loss.item())
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert losses[1] < losses[0] and before.keys() == after.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]) == (".modules_to_save." not in name), name
        assert parameter.grad is None


def test_a_second_task_trains_cores_on_the_factors_of_the_first(started: dict, place: Path) -> None:
    second = _train(place, "second", "--basis", place / "started")
    tensors = load_file(place / "second" / WEIGHTS)
    assert not [key for key in tensors if "lotr_U" in key or "lotr_V" in key]
    assert second["trained_numbers"]["adapter"] == 4 * 4 * 4 < started["trained_numbers"]["adapter"]
    assert second["accuracy"] > 0.8
    again = report("evaluate", place / "second", "--data", place / "dev.csv")
    assert again["accuracy"] == pytest.approx(second["accuracy"])
    assert json.loads((place / "second" / METRICS).read_text())["settings"]["basis"] == str(place / "started")
    inspected = report("inspect", place / "second")
    assert inspected["numbers"] == second["trained_numbers"]["adapter"]
    assert inspected["basis"] == started["trained_numbers"]["adapter"] - inspected["numbers"]
    assert report("plan", place / "bert", "--basis", place / "started")["trained_numbers"] == 4 * 4 * 4
    of_basis = (
        "--train",
        place / "train.csv",
        "--max-steps",
        "1",
        "--output",
        place / "third",
    )  # its model too
    assert report("train", *of_basis, "--basis", place / "started")["steps"] == 1
